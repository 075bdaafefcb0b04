"""The ring: a small device buffer through which the state of any block streams, tile by tile.

Three queues of device work: copies in, the update, copies out. What orders them are events: an update waits for its
tile's copy in; a copy out waits for the update; a copy in waits until its slot of the ring is free and, because a
block's next turn may come before its last copies out have landed, until its tile on the host is written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from hift_ds.state.host_memory import ALIGNMENT

TURN_BYTES = 64 << 20  # copied in one lane before other copies in that direction get a turn: 1.2 ms of PCIe 5


class Lane(Protocol):
    """A queue of device work, first in, first out."""

    def run(self, work: Callable[[], object]) -> None:
        """Appends work."""

    def record(self) -> Any:
        """An event: all work so far is done."""

    def wait(self, event: Any) -> None:
        """Work appended from now on begins after `event`, which another lane may have recorded."""

    def synchronize(self) -> None:
        """The host waits for all work so far."""

    def uses(self, tensor: torch.Tensor) -> None:
        """The tensor's memory is handed to nobody else before this lane's work is done, even if the tensor goes."""

    def copied(self, nbytes: int) -> None:
        """So much has been copied by this lane's last work; every TURN_BYTES other lanes' copies get a turn."""


class CudaLane:
    """A CUDA stream; without one, whatever stream is current.

    A GPU copies in one direction for one stream as long as that has copies which are ready, and a user's `loss.item()`
    waits. A kernel between two copies makes the stream wait for it, and the others come in (seen by torchrec's authors,
    meta-pytorch/torchrec pull requests 4315 and 4373). Its stream goes before the model's kernels, so that it is short.
    """

    def __init__(self, device: torch.device, own: bool) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1) if own else None
        self._since = 0  # bytes since the last turn of others
        if own:
            self._turn = torch.zeros(1, device=device)
            self.uses(self._turn)

    def run(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):  # None: as it is
            work()

    def record(self) -> torch.cuda.Event:
        return self._now().record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        self._now().wait_event(event)

    def synchronize(self) -> None:
        self._now().synchronize()

    def uses(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(self._now())

    def copied(self, nbytes: int) -> None:
        self._since += nbytes
        if self._since >= TURN_BYTES:
            self._since = 0
            self.run(lambda: self._turn.add_(1))

    def _now(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self._device)


class DirectLane:
    """Work is done when it is appended: where a device has no streams."""

    def run(self, work: Callable[[], object]) -> None:
        work()

    def record(self) -> Any:
        return None

    def wait(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def uses(self, tensor: torch.Tensor) -> None:
        pass

    def copied(self, nbytes: int) -> None:
        pass


@dataclass
class Lanes:
    """The three queues of a ring."""

    copy_in: Lane
    update: Lane
    copy_out: Lane

    @classmethod
    def of(cls, device: torch.device) -> Lanes:
        return cls(lane_of(device), lane_of(device, own=False), lane_of(device))


def lane_of(device: torch.device, own: bool = True) -> Lane:
    """A queue of the device: one of its own, or whatever stream is current."""
    return CudaLane(device, own) if device.type == "cuda" else DirectLane()


@dataclass(eq=False)
class Tile:
    """A range of one block's state at home on the host.

    Attributes:
        run: Index of the run of the block's shard that it belongs to.
        span: The elements of the shard.
        home: Its part of every state tensor, views.
        initial: What fills the tensors of a fresh state, by name; the others (masters) are loaded then, too.
        written: The event of its last copy out; `None` if there has been none.
    """

    run: int
    span: slice
    home: dict[str, torch.Tensor]
    initial: dict[str, float] = field(default_factory=dict)
    written: Any = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.home.values())


@dataclass(eq=False)
class _Slot:
    buffer: torch.Tensor
    free: Any = None  # the event after which it may be overwritten
    loaded: Any = None


class Ring:
    """Streams tiles through one preallocated buffer; loads run ahead as far as there are slots.

    Args:
        num_slots: Tiles on the device at a time.
        slot_bytes: Bytes of the largest tile, by `slot_bytes`.
        device: Where the buffer is.
        lanes: The queues.
    """

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device, lanes: Lanes | None = None) -> None:
        self.lanes = Lanes.of(device) if lanes is None else lanes
        self.buffer = torch.empty(num_slots * slot_bytes, dtype=torch.uint8, device=device)
        # What the allocator gave may still be in use by earlier work of the update's lane.
        since = self.lanes.update.record()
        self.lanes.copy_in.uses(self.buffer)
        self.lanes.copy_out.uses(self.buffer)
        self._slots = [_Slot(part, free=since) for part in self.buffer.split(slot_bytes)] if num_slots else []
        self._turn = 0
        self._ahead: deque[tuple[Tile, bool, _Slot]] = deque()  # loaded, fresh or not
        self._coming: deque[tuple[Tile, bool]] = deque()  # to be loaded after those

    @property
    def nbytes(self) -> int:
        """Device bytes, all that there ever are."""
        return self.buffer.nbytes

    def prefetch(self, tiles: Iterable[Tile], fresh: bool = False) -> None:
        """Begins to load `tiles`, as far as there are slots, for the coming visits of them, in this order.

        Args:
            fresh: As of `visit`.
        """
        self._ahead.clear()
        self._coming = deque((tile, fresh) for tile in tiles)
        while self._coming and len(self._ahead) < len(self._slots):
            self._load()

    def visit(
        self, tiles: Sequence[Tile], write: bool = True, fresh: bool = False
    ) -> Iterator[tuple[Tile, dict[str, torch.Tensor]]]:
        """Each tile with its tensors on the device, in order; consume it to the end.

        What `prefetch` has been told comes after them is loaded as slots become free.

        Args:
            write: What the caller has changed in place goes back to the host.
            fresh: State begins anew: what `Tile.initial` names is filled on the device and not loaded.
        """
        lanes = self.lanes
        told = [(tile, is_fresh) for tile, is_fresh, _ in self._ahead] + list(self._coming)
        if told[: len(tiles)] != [(tile, fresh) for tile in tiles]:
            self.prefetch(tiles, fresh)
        for tile in tiles:
            slot = self._ahead.popleft()[2]
            on_device = _views(slot.buffer, tile)
            lanes.update.wait(slot.loaded)
            yield tile, on_device
            slot.free = lanes.update.record()
            if write:
                lanes.copy_out.wait(slot.free)
                lanes.copy_out.run(partial(_copy, on_device, tile.home))
                slot.free = tile.written = lanes.copy_out.record()
                lanes.copy_out.copied(tile.nbytes)
            if self._coming:
                self._load()

    def settle(self) -> None:
        """The host's copies are whole after this and may be read or changed; what was loaded ahead is forgotten."""
        self.lanes.copy_in.synchronize()
        self.lanes.copy_out.synchronize()
        self._ahead.clear()
        self._coming.clear()

    def _load(self) -> None:
        tile, fresh = self._coming.popleft()
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        copy_in = self.lanes.copy_in
        copy_in.wait(slot.free)
        if tile.written is not None:
            copy_in.wait(tile.written)
        initial = tile.initial if fresh else {}
        copy_in.run(lambda: _load(tile.home, _views(slot.buffer, tile), initial))
        slot.loaded = copy_in.record()
        copy_in.copied(tile.nbytes)
        self._ahead.append((tile, fresh, slot))


def slot_bytes(sizes: Iterable[int]) -> int:
    """Bytes of a slot for tensors of these sizes in bytes."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _views(buffer: torch.Tensor, tile: Tile) -> dict[str, torch.Tensor]:
    views, offset = {}, 0
    for name, tensor in tile.home.items():
        views[name] = buffer[offset : offset + tensor.nbytes].view(tensor.dtype)
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return views


def _load(sources: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], initial: dict[str, float]) -> None:
    _copy({name: source for name, source in sources.items() if name not in initial}, targets)
    for name, value in initial.items():
        targets[name].fill_(value)


def _copy(sources: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> None:
    for name, source in sources.items():
        targets[name].copy_(source, non_blocking=True)
