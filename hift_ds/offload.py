"""`engine.offload_states` and `reload_states`: what is on the device goes to the host for a while."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Offloaded:
    """Storages whose memory was freed, and their bytes on the host; the tensors and all views of them stay.

    Args:
        tensors: Of one device. Those that share a storage move together.
        pin_memory: Page-lock the host's copies, on CUDA.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], pin_memory: bool) -> None:
        self._held: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if not storage.nbytes() or storage.data_ptr() in self._held:
                continue
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            host = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=pin_memory and tensor.device.type == "cuda")
            host.copy_(whole)
            self._held[storage.data_ptr()] = (storage, host)
        for storage, _ in self._held.values():
            storage.resize_(0)

    def reload(self) -> None:
        """Gives all of them their memory and their bytes again."""
        for storage, host in self._held.values():
            storage.resize_(host.numel())
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).copy_(host)
        self._held.clear()
