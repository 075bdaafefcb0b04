"""`engine.offload_states` and `reload_states`: what is on the device goes to the host for a while."""

from __future__ import annotations

from collections.abc import Iterable

import torch

WEIGHTS = "lp_params"  # DeepSpeed's names (OffloadStateTypeEnum)
STATES = frozenset({"hp_params", "optim_states"})


class Offloaded:
    """What is on the host now, by DeepSpeed's kinds.

    Weights are moved as DeepSpeed moves them, so that a state dict still has them. Of masters and moments, of which
    there are views everywhere, the storages are emptied: nobody may read them until `reload`.

    Args:
        device: Where all of it is at home.
    """

    def __init__(self, device: torch.device) -> None:
        self.kinds: set[str] = set()
        self._device = device
        self._weights: list[torch.Tensor] = []
        self._emptied: list[tuple[torch.UntypedStorage, torch.Tensor]] = []

    def take_weights(self, tensors: Iterable[torch.Tensor], pin_memory: bool) -> None:
        """Moves tensors that are on the device; those that share memory still do."""
        self.kinds.add(WEIGHTS)
        self._weights = [tensor for tensor in tensors if tensor.device == self._device and tensor.numel()]
        _move(self._weights, torch.device("cpu"), pin_memory)

    def take_states(self, kind: str, tensors: Iterable[torch.Tensor], pin_memory: bool) -> None:
        """Empties the storages of tensors; they and all views of them stay as they are."""
        self.kinds.add(kind)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                self._emptied.append((storage, _copied(storage, torch.device("cpu"), pin_memory)))
                storage.resize_(0)

    def reload(self) -> None:
        """Everything is on the device again."""
        for storage, host in self._emptied:
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host)
        _move(self._weights, self._device, pin_memory=False)
        self._emptied, self._weights = [], []
        self.kinds.clear()


def _move(tensors: list[torch.Tensor], device: torch.device, pin_memory: bool) -> None:
    moved: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        source = tensor.untyped_storage()
        if source.data_ptr() not in moved:
            moved[source.data_ptr()] = _copied(source, device, pin_memory).untyped_storage()
        target = torch.empty(0, dtype=tensor.dtype, device=device)
        tensor.data = target.set_(moved[source.data_ptr()], tensor.storage_offset(), tensor.size(), tensor.stride())


def _copied(storage: torch.UntypedStorage, device: torch.device, pin_memory: bool) -> torch.Tensor:
    pinned = pin_memory and storage.device.type == "cuda"
    return torch.empty(storage.nbytes(), dtype=torch.uint8, device=device, pin_memory=pinned).copy_(_bytes_of(storage))


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
