"""A machine without a device: host and device told apart, and the device's bytes counted tensor by tensor.

What is not declared host memory is on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_iter

from hift_ds.engine import HiFTEngine
from hift_ds.memory.storages import StorageMeter
from hift_ds.state import unit_state
from hift_ds.state.host_memory import HostMemory


@contextmanager
def separate_host(separate: bool = True, tile: int = unit_state.TILE_MULTIPLE) -> Iterator[None]:
    """Host and device as separate memories although both are the CPU; `tile`: elements of the ring's smallest."""
    smallest = mock.patch.object(unit_state, "TILE_MULTIPLE", tile)
    with mock.patch.object(HiFTEngine, "separate_host", separate), smallest:
        yield


class DeviceMeter(StorageMeter):
    """Inside `with meter.measuring():`, the bytes of every storage that an operation takes or makes, until it is freed.

    Host memory is what `hift_ds.state.host_memory.HostMemory` gives; `current` and `peak` leave it out.

    Args:
        tensors: Alive already, and on the device.

    Attributes:
        host: Host bytes alive.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.host = 0
        for tensor in tensors:
            self.add(tensor)
        self.restart()

    @contextmanager
    def measuring(self) -> Iterator[DeviceMeter]:
        """The mode, with host memory told apart."""
        original = HostMemory.arena

        def arena(*args: Any) -> dict[str, torch.Tensor]:
            tensors = original(*args)
            for tensor in tensors.values():
                self._track(tensor, self._change_host)
            return tensors

        with mock.patch.object(HostMemory, "arena", arena), self:
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for value in tree_iter((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result

    def _change_host(self, size: int) -> None:
        self.host += size
