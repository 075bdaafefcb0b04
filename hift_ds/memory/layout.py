"""What one DeepSpeed config makes of one model on so many ranks: shards, state, buckets. Exact, by arithmetic.

The shards, the reducer, the ring and the update rules are the training run's own; only tensors are fake.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hift_ds.config.resolve import ResolvedConfig
from hift_ds.memory.fake_model import FakeModel, text_config
from hift_ds.memory.gathering import Gathered, ParameterSize, replay
from hift_ds.memory.storages import StorageMeter
from hift_ds.memory.trace import Event
from hift_ds.rotation.blocks import BlockPlan, plan_blocks
from hift_ds.rotation.param_groups import check_trainable
from hift_ds.shards import UnitShard, pieces
from hift_ds.state.formats import GROUP
from hift_ds.state.host_memory import HostMemory, Shapes
from hift_ds.state.unit_state import TILE_NUMEL, RingSizes, Storage, extra_bytes, initial_extra, ring_sizes
from hift_ds.zero.gradients import GradientReducer
from hift_ds.zero.states import least_slots, turns
from hift_ds.zero.unit_gradients import HostGradients, UnitReducer, host_gradient_numel


@dataclass(frozen=True)
class Update:
    """The worst moment of an update: bytes of gradients, and of new weights with what it takes to make and send them.

    On top of `Layout.device_state`.
    """

    gradients: int = 0
    made: int = 0

    @property
    def nbytes(self) -> int:
        return self.gradients + self.made


@dataclass(frozen=True)
class GradientBytes:
    """What gradients take on the device in the course of one micro step, and the updates that go with it.

    Attributes:
        before: Before its backward (what earlier micro steps have left).
        events: At each gradient: at most while it is taken in, its own bytes included, and afterwards.
        updates: Those that each gradient brings about (`hift.update` "backward").
        finish: At most while the rest is reduced after backward.
        update: The one after backward.
        sent: Bytes handed to reductions.
    """

    before: int
    events: tuple[tuple[int, int], ...]
    updates: tuple[Update, ...]
    finish: int
    update: Update
    sent: int


class Layout:
    """The layout of one run.

    Args:
        model: The model.
        config: The run's.
        frozen: Parameters (fqns) that do not require gradients.
        card_bytes: Of one card's memory; `None` = not known.

    Attributes:
        block_plan: Blocks.
        shards: Of each block's units, as `States.blocks` has them, on rank 0.

    Raises:
        ValueError: Blocks or parameters that `hift_ds.initialize` refuses, too.
    """

    def __init__(
        self, model: FakeModel, config: ResolvedConfig, frozen: Collection[str] = (), card_bytes: int | None = None
    ) -> None:
        self.model, self.config, self._card_bytes = model, config, card_bytes
        self.params = dict(model.module.named_parameters())
        for fqn, param in self.params.items():  # a trace leaves most of them off
            param.requires_grad_(fqn not in frozen)
        self.block_plan: BlockPlan = plan_blocks(model.module, **config.hift.block_keys)
        check_trainable(model.module, self.block_plan, config.stage)
        self.rule, self.groups = config.rule, [{"params": [], **config.group}]
        self.dtype = next(iter(self.params.values())).dtype
        self.storage = Storage.of(config, torch.device("cuda"), planned=True)
        self.shards = [[self._shard(unit.fqns) for unit in reversed(block.units)] for block in self.block_plan.blocks]
        self.always = self._shard(self.block_plan.always_active) if self.block_plan.always_active else None
        self.units = [shard for units in self.shards for shard in units]
        self._factored = extra_bytes(map(self.extra, self.units))  # on the device while a unit is updated
        self.ring: RingSizes | None = None  # where state streams
        self.device_state, self.tile_numel = self._device_state()

    def _shard(self, fqns: Sequence[str]) -> UnitShard:
        params = [(fqn, self.params[fqn]) for fqn in fqns]
        return UnitShard(params, dict.fromkeys(fqns, 0), self.config.shard_world, 0)

    @property
    def trained(self) -> tuple[str, ...]:
        """Every parameter that is not frozen, in the model's order."""
        frozen = set(self.block_plan.frozen)
        return tuple(fqn for fqn in self.params if fqn not in frozen)

    @property
    def layer_types(self) -> Sequence[str]:
        """What kind each layer of the model is, where its config says so."""
        return getattr(text_config(self.model.config), "layer_types", None) or ()

    # Model weights.

    @property
    def persistent(self) -> frozenset[str]:
        """Parameters that stay gathered at stage 3 (DeepSpeed's `mark_persistent_parameters`)."""
        if self.config.stage < 3:
            return frozenset()
        names, total = [], 0
        for name, param in self.params.items():
            small = param.numel() <= self.config.zero.param_persistence_threshold
            if small and param.numel() + total <= self.config.zero.model_persistence_threshold:
                names.append(name)
                total += param.numel()
        return frozenset(names)

    @property
    def weights(self) -> int:
        """Bytes of model weights and buffers on the device, whatever the step does."""
        buffers = sum(buffer.nbytes for buffer in self.model.module.buffers())
        if self.config.stage < 3:
            return buffers + sum(param.nbytes for param in self.params.values())
        if self.config.world == 1 and not self.config.offloads_params:  # a lone rank's slices are the parameters
            return buffers + self.weight_shards
        shards = 0 if self.config.offloads_params else self.weight_shards
        return buffers + shards + sum(self.params[name].nbytes for name in self.persistent)

    @property
    def weight_shards(self) -> int:
        """Bytes of this rank's ZeRO-3 slices, padded."""
        return sum(math.ceil(p.numel() / self.config.world) * p.element_size() for p in self.params.values())

    @property
    def offloaded_weights(self) -> int:
        """Bytes of them on the host."""
        return self.weight_shards if self.config.offloads_params else 0

    @property
    def sizes(self) -> dict[str, ParameterSize]:
        """Of every parameter, for stage 3."""
        return {
            name: ParameterSize(
                p.numel(), p.nbytes, math.ceil(p.numel() / self.config.world) * self.config.world * p.element_size()
            )
            for name, p in self.params.items()
        }  # fmt: skip

    def gathered(self, events: Sequence[Event]) -> Gathered:
        """What stage 3 gathers during a micro step; nothing at the other stages."""
        alone = self.config.world == 1 and not self.config.offloads_params  # a lone rank's slices are the whole
        if self.config.stage < 3 or alone:
            return Gathered((0,) * len(events), (0,) * len(events), 0)
        return replay(events, self.sizes, self.persistent, self.config.zero)

    # State.

    def state_bytes(self, shard: UnitShard) -> int:
        """Masters and moments of a unit on this rank, wherever they are."""
        shapes = self.storage.shapes(shard, self.rule, self.groups)
        extra = self.extra(shard)
        return sum(numel * dtype.itemsize for numel, dtype in shapes.values()) + sum(t.nbytes for t in extra.values())

    def extra(self, shard: UnitShard) -> dict[str, torch.Tensor]:
        """A unit's state that is not shaped like its shard (fake tensors)."""
        with self.model.mode:
            return initial_extra(shard, self.rule, self.groups)

    def _device_state(self) -> tuple[int, int]:
        """Bytes of state on the device at all times, and elements of a tile."""
        always = 0 if self.always is None else self.state_bytes(self.always)
        if self.config.home == "host":
            return always, 0
        if self.config.home == "device":
            return always + sum(map(self.state_bytes, self.units)), TILE_NUMEL
        with self.model.mode:
            self.ring = ring = ring_sizes(
                turns(self.shards, self.config), self.rule, self.groups, self.storage,
                self.config.hift.state.ring_bytes, self._card_bytes, least_slots(self.config),
            )  # fmt: skip
        return always + ring.num_slots * ring.slot_bytes, ring.tile_numel

    def host_state(self) -> int:
        """Masters and moments on the host, of all blocks, and gradients that wait there."""
        waiting = self._host_gradient_numel * self.config.accumulation_dtype.itemsize
        return waiting + (0 if self.config.home == "device" else sum(map(self.state_bytes, self.units)))

    def training(self, block: int) -> list[UnitShard]:
        """What trains in a block's turn, as `States.training`."""
        return [*self.shards[block], *(() if self.always is None else (self.always,))]

    def update(self, shard: UnitShard, gradients: int) -> Update:
        """Of a unit, or of what is always active.

        Args:
            gradients: Bytes of all gradients that are there when it begins.
        """
        ranges = [tile for _, tile in shard.tiles(self.tile_numel or TILE_NUMEL)]
        if self.rule.elementwise and self.config.home != "host":
            ranges = [part for tile in ranges for part in shard.parts(tile, GROUP)]
        gradients_of = ranges if self.rule.elementwise else [slice(run.start, run.stop) for run in shard.runs]
        lone = self.config.hift.update == "backward" and self.config.world == self.config.micro_steps == 1
        in_place = not self.config.offloads_params and all(param.dtype == shard.dtype for param in shard.params)
        new = _longest(_shared(shard, ranges) if in_place else ranges) * shard.dtype.itemsize
        if self.config.sends_weights:
            new = shard.numel * shard.dtype.itemsize
        elif self.config.home == "host":
            new = 0  # it comes from the host, straight to its place
        made = 0 if self.config.home == "host" or self.config.home == "device" else self._factored
        own = shard.numel * self.config.accumulation_dtype.itemsize
        if self.config.kernel == "torch" and self.config.home != "host":
            if lone or self.config.accumulation_dtype != torch.float32:  # else the rule works in the gradient itself
                made += 4 * _longest(gradients_of)
            if not self.rule.elementwise:  # the estimate of the second moment of the largest slice
                made += 4 * max(segment.numel for segment in shard.segments)
        if lone:
            made += _longest(_shared(shard, gradients_of)) * self.config.accumulation_dtype.itemsize
        sent = 0
        if self.config.sends_weights:
            sent = max(self._packed(shard, bucket) for bucket in shard.buckets(self.config.zero.allgather_bucket_size))
        if own + made >= sent:
            return Update(gradients, new + made)
        return Update(gradients - own, new + sent)

    def _packed(self, shard: UnitShard, bucket: range) -> int:
        span = shard.span(bucket)
        return (span.stop - span.start) * shard.world * self.params[shard.fqns[bucket[0]]].element_size()

    # Gradients.

    def gradient_bytes(self, block: int, order: Sequence[str]) -> GradientBytes:
        """Runs the real reducer over fake gradients of a block (and the always-active parameters).

        Args:
            order: fqns in the order in which backward completes their gradients.
        """
        shards, coming = self.training(block), {self.params[fqn] for fqn in order}
        updates: list[Update] = []

        on_its_way: list[torch.Tensor] = []  # new weights to other ranks: the last piece of the unit before

        def give(shard: UnitShard) -> None:
            updates.append(self.update(shard, meter.current))
            reducer.take(shard)
            if self.config.sends_weights:
                received = self._packed(shard, shard.buckets(self.config.zero.allgather_bucket_size)[-1])
                on_its_way[:] = [torch.empty(received + received // shard.world, dtype=torch.uint8)]

        with self.model.mode:
            host = self._host_gradients()
            meter = StorageMeter([] if host is None else [host.buffer])
            reducer: Any = _SilentReducer(self.config, None)
            if self.config.hift.update == "backward":
                reducer = _SilentUnitReducer(self.config, None, give, host)
                reducer.will_come = coming.__contains__
            with meter:
                reducer.open(shards)
                for micro_step in range(min(self.config.micro_steps, 2)):
                    last = micro_step + 1 == min(self.config.micro_steps, 2)
                    if isinstance(reducer, UnitReducer):
                        reducer.at_boundary = partial(bool, last)
                    reducer.sent = 0
                    before, events, brought = meter.current, [], []
                    for fqn in order:
                        events.append(self._take(reducer, meter, self.params[fqn]))
                        brought.append(max(updates, key=lambda update: update.nbytes, default=Update()))
                        updates.clear()
                    meter.restart()
                    reducer.finish_backward(last)
                    finish = meter.peak
                if isinstance(reducer, UnitReducer):
                    on_its_way.clear()  # it has arrived when backward has ended
                    reducer.give_rest()
                    finish = max(finish, meter.peak)
                else:
                    grads = [shard.numel * self.config.accumulation_dtype.itemsize for shard in shards]
                    updates += [self.update(shard, sum(grads[place:])) for place, shard in enumerate(shards)]
            for fqn in order:
                self.params[fqn].grad = None
        worst = max(updates, key=lambda update: update.nbytes, default=Update())
        return GradientBytes(before, tuple(events), tuple(brought), finish, worst, reducer.sent)

    def _host_gradients(self) -> HostGradients | None:
        if self._host_gradient_numel == 0:
            return None
        return HostGradients(_FakeMemory(), self._host_gradient_numel, self.config.accumulation_dtype)

    @property
    def _host_gradient_numel(self) -> int:
        return host_gradient_numel(self.config, map(self.training, range(len(self.shards))))

    def _take(self, reducer: GradientReducer, meter: StorageMeter, param: torch.nn.Parameter) -> tuple[int, int]:
        meter.restart()
        if param.grad is None:
            param.grad = torch.empty_like(param)
        reducer.on_gradient(param)
        return meter.peak, meter.current

    # Traffic of one optimizer step.

    def bus_bytes(self, shard: UnitShard) -> tuple[int, int]:
        """State and gradients to the device, and back to the host."""
        if self.config.home == "device":
            return 0, 0
        if self.config.home == "host":
            return shard.numel * shard.dtype.itemsize, shard.numel * self.config.accumulation_dtype.itemsize
        back = self.state_bytes(shard)
        master = self.storage.shapes(shard, self.rule, self.groups).get("master")
        again = 0 if self.rule.elementwise or master is None else master[0] * master[1].itemsize
        return back + again, back

    def published_bytes(self, block: int) -> int:
        """Handed to collectives by the update of a block (and the always-active parameters).

        New weights, and sums of factored moments.
        """
        total = 0
        if self.config.world > 1:  # stage 3 gathers them again after each update
            sizes = self.sizes
            total += sum(sizes[name].padded_bytes for name in self.persistent)
        for shard in self.training(block):
            if shard.world > 1:
                total += sum(tensor.nbytes for tensor in self.extra(shard).values())
            if self.config.sends_weights:
                buckets = shard.buckets(self.config.zero.allgather_bucket_size)
                total += sum(self._packed(shard, bucket) for bucket in buckets)
        return total


class _Silent:
    """Of the training run's reducers, but nothing is sent."""

    sent = 0

    def _send(self, packed: torch.Tensor, reduced: torch.Tensor) -> Any:
        self.sent += packed.nbytes
        return _Done()


class _SilentReducer(_Silent, GradientReducer):
    pass


class _SilentUnitReducer(_Silent, UnitReducer):
    pass


class _FakeMemory(HostMemory):
    def arena(self, shapes: Shapes) -> dict[str, torch.Tensor]:
        return {name: torch.empty(numel, dtype=dtype) for name, (numel, dtype) in shapes.items()}


class _Done:
    def wait(self) -> None:
        pass


def _longest(ranges: Iterable[slice]) -> int:
    return max((one.stop - one.start for one in ranges), default=0)


def _shared(shard: UnitShard, ranges: Iterable[slice]) -> Iterator[slice]:
    """Those that no parameter fills: they are updated in a copy."""
    for one in ranges:
        numel = one.stop - one.start
        if all(last - first < numel for _, first, last in pieces(shard.segments, one.start, numel)):
            yield one
