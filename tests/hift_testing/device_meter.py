"""Device bytes counted tensor by tensor on a machine without a device: what is not declared host memory is on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hift_ds.host_memory import HostMemory


class DeviceMeter(TorchDispatchMode):
    """Inside `with meter:`, the bytes of every storage alive, noted after each operation.

    Host memory is what `hift_ds.host_memory.HostMemory` gives. Seen are the operands and results of torch's operations;
    unseen is what one operation allocates and frees inside itself.

    Attributes:
        current: Device bytes alive after the last operation.
        peak: Most device bytes alive since `reset_peak`.
        host: Host bytes alive.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.current = self.peak = self.host = 0
        self._alive: dict[int, tuple[StorageWeakRef, int, bool]] = {}
        self._on_host = False
        for tensor in tensors:
            self._note(tensor)
        self.reset_peak()

    def reset_peak(self) -> None:
        """Begins a new phase."""
        self._sweep()
        self.peak = self.current

    @contextmanager
    def measuring(self) -> Iterator[DeviceMeter]:
        """The mode, with host memory told apart."""
        original = HostMemory.arena

        def arena(*args: Any) -> dict[str, torch.Tensor]:
            tensors = original(*args)
            self._on_host = True
            try:
                for tensor in tensors.values():
                    self._note(tensor)
            finally:
                self._on_host = False
            return tensors

        with mock.patch.object(HostMemory, "arena", arena), self:
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._sweep()
        for value in tree_iter((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                self._note(value)
        self.peak = max(self.peak, self.current)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        # A weak reference keeps the address from being used again.
        self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), self._on_host)
        self._add(storage.nbytes(), self._on_host)

    def _sweep(self) -> None:
        for address in [address for address, (reference, _, _) in self._alive.items() if reference.expired()]:
            _, size, on_host = self._alive.pop(address)
            self._add(-size, on_host)

    def _add(self, size: int, on_host: bool) -> None:
        if on_host:
            self.host += size
        else:
            self.current += size
