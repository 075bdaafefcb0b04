"""Bytes of the tensors alive, counted storage by storage: under FakeTensorMode a forecast, around real steps a measure.

Seen are the results of torch's operations; unseen is what one operation allocates and frees inside itself, and what an
allocator adds by rounding and caching.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageMeter(TorchDispatchMode):
    """Inside `with meter:`, the bytes of every storage that an operation has made, each once, until it is freed.

    Args:
        ignored: Tensors whose storages are not counted (the model weights, which others count).

    Attributes:
        current: Bytes alive now.
        peak: Most bytes alive since `restart`.
        peak_clock: When the peak was, in storages made before it.
    """

    def __init__(self, ignored: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.current = self.peak = 0
        # Storages are told apart by identity; torch keeps a storage's Python object as long as the storage lives.
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._clock = self.peak_clock = 0
        for tensor in ignored:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the storage of a tensor, if it is not counted yet."""
        self._track(tensor, self._change)

    def restart(self) -> None:
        """Begins a new peak."""
        self.peak, self.peak_clock = self.current, self._clock

    def made_at(self, tensor: torch.Tensor) -> int:
        """When the storage of a tensor was made, on the clock of `peak_clock`."""
        return self._seen[tensor.untyped_storage()]

    def _track(self, tensor: torch.Tensor, change: Callable[[int], None]) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen or tensor.device.type == "meta":  # a fake tensor says the device that it stands for
            return
        self._clock += 1
        self._seen[storage] = self._clock
        change(storage.nbytes())
        weakref.finalize(storage, change, -storage.nbytes()).atexit = False

    def _change(self, size: int) -> None:
        self.current += size
        if self.current > self.peak:
            self.peak, self.peak_clock = self.current, self._clock
