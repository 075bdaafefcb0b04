"""How long a step takes: the real ring on lanes that only count time. A model, not a measurement.

Matrix products take their operations over what the card reaches; copies their bytes over the bus, one queue each way;
an update the bytes that it moves in the card's memory. What waits for what are the ring's own events. Attention's
products, the network and the host's own time are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hift_ds.memory.layout import Layout
from hift_ds.rotation.rotation import Rotation
from hift_ds.shards import UnitShard
from hift_ds.state.ring import DirectLane, Lanes, Ring, Tile
from hift_ds.state.unit_state import bytes_of_tile

REACHED = 0.5  # of a card's published products, where nobody says better


@dataclass(frozen=True)
class Card:
    """A card's published figures, and what copies of page-locked memory reach on its bus.

    Attributes:
        memory: Bytes.
        bus: Bytes a second, each way.
        products: bf16 operations a second, dense.
        bandwidth: Bytes a second of its own memory.
    """

    memory: int
    bus: float
    products: float
    bandwidth: float


# NVIDIA's data sheets; of the bus 80 % of PCIe 4 x16 (31.5 GB/s) and PCIe 5 x16 (63 GB/s), of NVLink-C2C none is here.
CARDS = {
    "rtx3090": Card(24 << 30, 25e9, 71e12, 936e9),
    "rtx4090": Card(24 << 30, 25e9, 165.2e12, 1008e9),
    "rtx5090": Card(32 << 30, 50e9, 209.5e12, 1792e9),
    "a6000": Card(48 << 30, 25e9, 154.8e12, 768e9),
    "a100-80gb": Card(80 << 30, 25e9, 312e12, 2039e9),
    "h100": Card(80 << 30, 50e9, 989.4e12, 3350e9),
    "h200": Card(141 << 30, 50e9, 989.4e12, 4800e9),
}


@dataclass(frozen=True)
class Speeds:
    """What the model of a step goes by: bytes a second of the bus (each way) and of memory, operations a second."""

    bus: float
    products: float
    bandwidth: float


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


def forward_operations(layout: Layout, micro_batch: int, seq: int) -> float:
    """Of the matrix products of one forward, counted over the real model."""
    module, counter = layout.model.module, FlopCounterMode(display=False)
    with layout.model.mode, torch.no_grad(), counter:
        module(**layout.model.batch(micro_batch, seq))
    return float(counter.get_total_flops())


def timing(layout: Layout, seq: int, checkpointing: bool, speeds: Speeds) -> Timing | None:
    """The mean step of a cycle in the steady state; `None` with updates on the host, of which there is no model."""
    config = layout.config
    if config.home == "host":
        return None
    model = _Step(layout, forward_operations(layout, config.micro_batch, seq), checkpointing, speeds)
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

    def __init__(self, layout: Layout, operations: float, checkpointing: bool, speeds: Speeds) -> None:
        self._layout, self._speeds = layout, speeds
        self._seconds = operations / speeds.products  # of a forward
        self._recompute = 1.0 if checkpointing else 0.0
        self._lanes = Lanes(_Lane(speeds.bus), _Lane(speeds.bandwidth), _Lane(speeds.bus))
        self._ring: Ring | None = None
        if layout.ring is not None and layout.ring.num_slots:
            self._ring = Ring(layout.ring.num_slots, layout.ring.slot_bytes, torch.device("meta"), self._lanes)
        self._tiles = {id(shard): list(_tiles(layout, shard)) for shard in layout.units}
        self._units = [unit for units in layout.shards for unit in reversed(units)]  # from the bottom up
        products = [_products(layout, shard) for shard in self._units]
        self._share = [numel / (sum(products) or 1) for numel in products]

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
            compute.work(self._seconds)  # type: ignore[attr-defined]
            for index in range(len(self._units) - 1, lowest - 1, -1):
                shard = self._units[index]
                trained = any(shard is one for one in active)
                times = 1.0 + trained + self._recompute
                compute.work(times * self._share[index] * self._seconds)  # type: ignore[attr-defined]
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
            self._lanes.update.work((2 * tile.nbytes + beside) / self._speeds.bandwidth)  # type: ignore[attr-defined]


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
    for index, run in enumerate(shard.runs):
        for start in range(run.start, run.stop, layout.tile_numel):
            span = slice(start, min(start + layout.tile_numel, run.stop))
            nbytes = bytes_of_tile(shapes, span.stop - span.start)
            yield Tile(index, span, {"state": torch.empty(nbytes, dtype=torch.uint8, device="meta")})


def _products(layout: Layout, shard: UnitShard) -> int:
    """Elements of a unit that matrix products use: all but vectors and lookup tables (a tied one is a head, too)."""
    tables = {
        id(part.weight) for part in layout.model.module.modules() if isinstance(part, torch.nn.Embedding)
    } - {id(part.weight) for part in layout.model.module.modules() if isinstance(part, torch.nn.Linear)}
    return sum(param.numel() for param in shard.params if param.ndim > 1 and id(param) not in tables)
