"""How long a step takes: the real ring on lanes that only count time. A model, not a measurement.

Products take their operations over what the card reaches, or their matrices' bytes over its memory's speed, where that
is longer; all else of forward and backward, and an update, the bytes that it moves in the card's memory; copies their
bytes over the bus, one queue each way. What waits for what are the ring's own events. The network and the host's own
time are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hift_ds.memory.layout import Layout
from hift_ds.memory.work import Work, micro_step_work
from hift_ds.rotation.rotation import Rotation
from hift_ds.shards import UnitShard
from hift_ds.state.ring import DirectLane, Lanes, Ring, Tile
from hift_ds.state.unit_state import bytes_of_tile

# Read off traced steps of Llama-3.1-8B and LLaMA-2-7B on an H200 (launch/results/2026-11-27_gpu_h200).
REACHED = 0.96  # of the rate of large products, by those of the model
ELEMENTWISE = 0.45  # of the data sheet's rate of memory, by torch's kernels in forward and backward
STREAMED = 0.85  # of it, by the fused update, and by a product that memory bounds


@dataclass(frozen=True)
class Card:
    """A card's figures, and what copies of page-locked memory reach on its bus.

    Attributes:
        memory: Bytes.
        bus: Bytes a second, each way.
        products: Operations a second that torch's large bf16 products reach.
        bandwidth: Bytes a second of its own memory, by the data sheet.
    """

    memory: int
    bus: float
    products: float
    bandwidth: float


# Products: what torch reached with square matrices of 1024 to 10240, each card's lowest entry there, in
# zzc0721/torch-performance-test-data on GitHub (database.md at 0785868; on an H200 we found 788 and 798). Memory:
# NVIDIA's data sheets. Bus: PCIe 5 x16 as measured on an H100 and an H200, both ways together; of PCIe 4 x16 80 %.
CARDS = {
    "rtx3090": Card(24 << 30, 25e9, 76.3e12, 936e9),
    "rtx4090": Card(24 << 30, 25e9, 162.4e12, 1008e9),
    "rtx5090": Card(32 << 30, 48e9, 236e12, 1792e9),
    "a6000": Card(48 << 30, 25e9, 123.3e12, 768e9),
    "a100-80gb": Card(80 << 30, 25e9, 264.5e12, 2039e9),
    "h100": Card(80 << 30, 48e9, 783.7e12, 3350e9),
    "h200": Card(141 << 30, 48e9, 790.3e12, 4800e9),
}


@dataclass(frozen=True)
class Speeds:
    """What the model of a step goes by: bytes a second of the bus (each way) and of memory, operations a second."""

    bus: float
    products: float
    bandwidth: float

    @property
    def balance(self) -> float:
        """Operations of a product in the time of a byte of its matrices."""
        return REACHED * self.products / (STREAMED * self.bandwidth)

    def seconds(self, work: Work) -> float:
        """Of a forward or a backward."""
        of_memory = work.moved / ELEMENTWISE + work.streamed / STREAMED
        return work.operations / (REACHED * self.products) + of_memory / self.bandwidth


@dataclass(frozen=True)
class Timing:
    """Seconds of an optimizer step of a rank, mean over a cycle.

    Attributes:
        compute: Forward, backward and update.
        copies: Of state, in the busier direction.
        step: All of it.
        tokens: Of a step.
    """

    compute: float
    copies: float
    step: float
    tokens: int

    @property
    def exposed(self) -> float:
        """Copies that nothing hides."""
        return max(0.0, self.step - self.compute)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step


def timing(
    layout: Layout, seq: int, speeds: Speeds, padded: bool = False, compiled: bool = False
) -> Timing | None:
    """The mean step of a cycle in the steady state; `None` with updates on the host, of which there is no model."""
    config = layout.config
    if config.home == "host":
        return None
    model = _Step(
        layout, speeds,
        lambda trained: micro_step_work(
            layout.model, trained, config.micro_batch, seq, padded, compiled, speeds.balance
        ),
    )  # fmt: skip
    rotation = Rotation(len(layout.shards), config.hift.order, config.hift.seed, config.hift.steps_per_block)
    count = max(rotation.steps_per_cycle, 2)
    marks = []
    for step in range(2 * count):
        if step in (0, count):
            marks.append(model.totals())
        block = rotation.active_block
        rotation.advance()
        model.run(block, rotation.active_block)
    marks.append(model.totals())
    seconds, compute, copies_in, copies_out = ((b - a) / count for a, b in zip(marks[1], marks[2], strict=True))
    return Timing(compute, max(copies_in, copies_out), seconds, config.micro_batch * config.micro_steps * seq)


class _Step:
    """Runs steps on a clock."""

    def __init__(
        self, layout: Layout, speeds: Speeds, work: Callable[[Collection[str]], tuple[Work, dict[str, Work]]]
    ) -> None:
        """`work`: of a forward and a backward with gradients of the parameters that it is given."""
        self._layout, self._speeds = layout, speeds
        self._lanes = Lanes(_Lane(speeds.bus), _Lane(speeds.bandwidth), _Lane(speeds.bus))
        self._ring: Ring | None = None
        if layout.ring is not None and layout.ring.num_slots:
            self._ring = Ring(layout.ring.num_slots, layout.ring.slot_bytes, torch.device("meta"), self._lanes)
        self._tiles = {id(shard): list(_tiles(layout, shard)) for shard in layout.units}
        self._units = [unit for units in layout.shards for unit in reversed(units)]  # from the bottom up
        self._train = self._backward(work(layout.trained)[1])
        forward, until = work([fqn for shard in self._units for fqn in _least(shard, layout.params)])
        self._forward, self._carry = speeds.seconds(forward), self._backward(until)

    def _backward(self, until: dict[str, Work]) -> list[float]:
        """Seconds of a backward in each unit: up to its last gradient, from that of the unit before it."""
        done = {fqn: self._speeds.seconds(work) for fqn, work in until.items()}
        ends = [max((done[fqn] for fqn in shard.fqns if fqn in done), default=0.0) for shard in self._units]
        seconds, before = [0.0] * len(ends), 0.0
        for index in sorted(range(len(ends)), key=lambda index: (ends[index], -index)):
            seconds[index], before = ends[index] - before, ends[index]
        return seconds

    def totals(self) -> tuple[float, float, float, float]:
        """The clock, and how long each lane has worked: compute, copies in, copies out."""
        lanes: list[Any] = [self._lanes.update, self._lanes.copy_in, self._lanes.copy_out]
        return lanes[0].free, *(lane.busy for lane in lanes)

    def run(self, block: int, following: int) -> None:
        """A step of one block, and the beginning of the next one's copies."""
        config, compute = self._layout.config, self._lanes.update
        active = self._layout.shards[block]
        lowest = min(self._units.index(shard) for shard in active)
        for micro_step in range(config.micro_steps):
            compute.work(self._forward)  # type: ignore[attr-defined]
            for index in range(len(self._units) - 1, lowest - 1, -1):
                shard = self._units[index]
                trained = any(shard is one for one in active)
                compute.work((self._train if trained else self._carry)[index])  # type: ignore[attr-defined]
                if trained and config.hift.update == "backward" and micro_step + 1 == config.micro_steps:
                    self._update(shard)
        if config.hift.update == "step":
            for shard in active:
                self._update(shard)
        if self._ring is not None:
            self._ring.prefetch([tile for shard in self._layout.shards[following] for tile in self._tiles[id(shard)]])

    def _update(self, shard: UnitShard) -> None:
        tiles = self._tiles[id(shard)]
        visit = self._ring.visit(tiles) if self._ring is not None else ((tile, tile.home) for tile in tiles)
        for tile, _ in visit:
            numel = tile.span.stop - tile.span.start
            beside = numel * (self._layout.config.accumulation_dtype.itemsize + shard.dtype.itemsize)
            seconds = (2 * tile.nbytes + beside) / (STREAMED * self._speeds.bandwidth)
            self._lanes.update.work(seconds)  # type: ignore[attr-defined]


class _Lane(DirectLane):
    """A queue whose work takes as long as its bytes take at a speed; an event is a time."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self.free = self.busy = 0.0

    def work(self, seconds: float) -> None:
        self.free += seconds
        self.busy += seconds

    def run(self, work: Callable[[], object]) -> None:
        with _Copied() as copied:
            work()
        self.work(copied.nbytes / self._speed)

    def record(self) -> Any:
        return self.free

    def wait(self, event: Any) -> None:
        self.free = max(self.free, event or 0.0)


class _Copied(TorchDispatchMode):
    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.nbytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def _tiles(layout: Layout, shard: UnitShard) -> Iterator[Tile]:
    """As UnitState cuts them; one tensor stands for all."""
    shapes = layout.storage.shapes(shard, layout.rule, layout.groups)
    for index, span in shard.tiles(layout.tile_numel):
        nbytes = bytes_of_tile(shapes, span.stop - span.start)
        yield Tile(index, span, {"state": torch.empty(nbytes, dtype=torch.uint8, device="meta")})


def _least(shard: UnitShard, params: dict[str, torch.nn.Parameter]) -> list[str]:
    """Parameters of a unit whose gradients cost next to nothing and tell where backward is done with it."""
    small = [fqn for fqn in shard.fqns if params[fqn].ndim < 2]
    return small or [min(shard.fqns, key=lambda fqn: params[fqn].numel())]
