"""What one DeepSpeed config makes of one model on so many ranks: shards, state, buckets. Exact, by arithmetic.

The shards, the reducer, the ring and the update rules are the training run's own; only tensors are fake.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum

from hift_ds.config.kernels import expected_kernel
from hift_ds.config.keys import HiFTConfig
from hift_ds.config.optimizers import check_form, rule_from_config
from hift_ds.memory.fake_model import FakeModel
from hift_ds.memory.gathering import Gathered, Limits, ParameterSize, replay
from hift_ds.memory.storages import StorageMeter
from hift_ds.memory.trace import Event
from hift_ds.rotation.blocks import BlockPlan, plan_blocks
from hift_ds.rules import Rule
from hift_ds.shards import BlockShard
from hift_ds.state.block_state import TILE_NUMEL, Storage, extra_bytes, initial_extra, plan_ring
from hift_ds.state.formats import Form
from hift_ds.zero.gradients import Averaging, GradientReducer, accumulation_dtype
from hift_ds.zero.settings import Settings, updates_on_host


@dataclass(frozen=True)
class GradientBytes:
    """What gradients take on the device in the course of one micro step.

    Attributes:
        before: Before its backward (what earlier micro steps have left).
        events: At each gradient: at most while it is taken in, its own bytes included, and afterwards.
        finish: At most while the rest is reduced after backward.
        after: Left for the update.
        sent: Bytes handed to reductions.
    """

    before: int
    events: tuple[tuple[int, int], ...]
    finish: int
    after: int
    sent: int


class Layout:
    """The layout of one run.

    Args:
        model: The model.
        ds_config: A DeepSpeed config with a "hift" section and its batch sizes resolved.
        hift: That section.
        world: Ranks.
        frozen: Parameters (fqns) that do not require gradients.
        card_bytes: Of one card's memory; `None` = not known.
        on_cpu: The ranks train on CPUs.

    Attributes:
        plan: Blocks.
        shards: Of each block, on rank 0.
        settings: As the engine would give them to the optimizer on a GPU.

    Raises:
        ValueError, TypeError: As `hift_ds.initialize`.
    """

    def __init__(
        self,
        model: FakeModel,
        ds_config: Mapping[str, Any],
        hift: HiFTConfig,
        world: int,
        frozen: Collection[str] = (),
        card_bytes: int | None = None,
        on_cpu: bool = False,
    ) -> None:
        self.model, self.hift, self.world = model, hift, world
        # Without a process group DeepSpeed takes the world for 1, and would not agree with the batch of all ranks.
        self.deepspeed = DeepSpeedConfig({key: value for key, value in ds_config.items() if key != "train_batch_size"})
        self.zero = self.deepspeed.zero_config
        self.stage = int(self.deepspeed.zero_optimization_stage)
        self.micro_steps = self.deepspeed.gradient_accumulation_steps
        self.params = dict(model.module.named_parameters())
        for fqn, param in self.params.items():  # a trace leaves most of them off
            param.requires_grad_(fqn not in frozen)
        self.plan: BlockPlan = plan_blocks(
            model.module, layers_per_block=hift.layers_per_block or 1, blocks=hift.blocks, frozen=hift.frozen,
            always_active=hift.always_active,
        )  # fmt: skip
        section = ds_config.get("optimizer") or {"type": "AdamW"}
        self.rule: Rule
        self.rule, defaults = rule_from_config(section["type"], section.get("params"))
        self.groups = [{"params": [], **defaults}]
        self.dtype = next(iter(self.params.values())).dtype
        check_form(hift.state.master, hift.state.moments, self.rule, self.dtype)
        self.settings = self._settings(ds_config, card_bytes, on_cpu)
        # No memory: nothing is allocated here, only sizes are asked for.
        self.storage = Storage(torch.device("cuda"), self.settings.form, own_master=self.settings.on_host)
        self.shards = [self._shard(block.fqns) for block in self.plan.blocks]
        self.always = self._shard(self.plan.always_active) if self.plan.always_active else None
        self._factored = extra_bytes(map(self.extra, self.shards))  # on the device while a block is updated
        self.device_state, self._tile_numel = self._device_state()

    def _settings(self, ds_config: Mapping[str, Any], card_bytes: int | None, on_cpu: bool) -> Settings:
        state = self.hift.state
        return Settings(
            stage=self.stage,
            world=self.world,
            clip=self.deepspeed.gradient_clipping,
            publish_numel=self.zero.allgather_bucket_size,
            reset_state=self.hift.inactive_state == "reset",
            kernel=expected_kernel(self.hift.kernel, on_cpu, state.compact, updates_on_host(ds_config)),
            form=Form(state.master, state.moments),
            resident=state.residency == "device",
            ring_bytes=state.ring_bytes,
            on_host=updates_on_host(ds_config),
            seed=self.hift.seed,
            card_bytes=card_bytes,
        )

    def _shard(self, fqns: Sequence[str]) -> BlockShard:
        world = self.world if self.stage > 0 else 1
        return BlockShard([(fqn, self.params[fqn]) for fqn in fqns], dict.fromkeys(fqns, 0), world, 0)

    @property
    def trained(self) -> tuple[str, ...]:
        """Every parameter that is not frozen, in the model's order."""
        frozen = set(self.plan.frozen)
        return tuple(fqn for fqn in self.params if fqn not in frozen)

    @property
    def layer_types(self) -> Sequence[str]:
        """What kind each layer of the model is, where its config says so."""
        return getattr(self.model.config, "layer_types", None) or ()

    # Model weights.

    @property
    def persistent(self) -> frozenset[str]:
        """Parameters that stay gathered at stage 3 (DeepSpeed's `mark_persistent_parameters`)."""
        if self.stage < 3:
            return frozenset()
        names, total = [], 0
        for name, param in self.params.items():
            small = param.numel() <= self.zero.param_persistence_threshold
            if small and param.numel() + total <= self.zero.model_persistence_threshold:
                names.append(name)
                total += param.numel()
        return frozenset(names)

    @property
    def weights(self) -> int:
        """Bytes of model weights and buffers on the device, whatever the step does."""
        buffers = sum(buffer.nbytes for buffer in self.model.module.buffers())
        if self.stage < 3:
            return buffers + sum(param.nbytes for param in self.params.values())
        if self.world == 1 and not self.offloads_params:  # a lone rank's slices are the parameters
            return buffers + self.weight_shards
        shards = 0 if self.offloads_params else self.weight_shards
        return buffers + shards + sum(self.params[name].nbytes for name in self.persistent)

    @property
    def weight_shards(self) -> int:
        """Bytes of this rank's ZeRO-3 slices, padded."""
        return sum(math.ceil(p.numel() / self.world) * p.element_size() for p in self.params.values())

    @property
    def offloaded_weights(self) -> int:
        """Bytes of them on the host."""
        return self.weight_shards if self.offloads_params else 0

    @property
    def offloads_params(self) -> bool:
        """Whether the ZeRO-3 slices are on the host."""
        section = self.zero.offload_param
        return self.stage == 3 and section is not None and section.device == "cpu"

    @property
    def sizes(self) -> dict[str, ParameterSize]:
        """Of every parameter, for stage 3."""
        return {
            name: ParameterSize(
                p.numel(), p.nbytes, math.ceil(p.numel() / self.world) * self.world * p.element_size()
            )
            for name, p in self.params.items()
        }  # fmt: skip

    @property
    def limits(self) -> Limits:
        """DeepSpeed's, for stage 3."""
        return Limits(self.zero.prefetch_bucket_size, self.zero.max_live_parameters, self.zero.max_reuse_distance)

    def gathered(self, events: Sequence[Event]) -> Gathered:
        """What stage 3 gathers during a micro step; nothing at the other stages."""
        if self.stage < 3 or (self.world == 1 and not self.offloads_params):  # a lone rank's slices are the whole
            return Gathered((0,) * len(events), (0,) * len(events), 0)
        return replay(events, self.sizes, self.persistent, self.limits)

    # State.

    def state_bytes(self, shard: BlockShard) -> int:
        """Masters and moments of a block on this rank, wherever they are."""
        shapes = self.storage.shapes(shard, self.rule, self.groups)
        extra = self.extra(shard)
        return sum(numel * dtype.itemsize for numel, dtype in shapes.values()) + sum(t.nbytes for t in extra.values())

    def extra(self, shard: BlockShard) -> dict[str, torch.Tensor]:
        """A block's state that is not shaped like its shard (fake tensors)."""
        with self.model.mode:
            return initial_extra(shard, self.rule, self.groups)

    def _device_state(self) -> tuple[int, int]:
        """Bytes of state on the device at all times, and elements of a tile."""
        always = 0 if self.always is None else self.state_bytes(self.always)
        if self.settings.on_host:
            return always, 0
        if self.settings.resident:
            return always + sum(map(self.state_bytes, self.shards)), TILE_NUMEL
        shapes = [(shard, self.storage.shapes(shard, self.rule, self.groups)) for shard in self.shards]
        ring = plan_ring(shapes, self.settings.ring_bytes, self._factored, self.settings.card_bytes)
        return always + ring.num_slots * ring.slot_bytes, ring.tile_numel

    def host_state(self) -> int:
        """Masters and moments on the host, of all blocks."""
        return 0 if self.settings.resident else sum(map(self.state_bytes, self.shards))

    def update_bytes(self, shard: BlockShard, gradients: int) -> tuple[int, int]:
        """Most bytes during the update of a block, on top of `device_state`.

        Args:
            gradients: Bytes of the averaged gradient shards.

        Returns:
            Of gradients, and of new weights with what it takes to make and send them.
        """
        new = shard.numel * shard.dtype.itemsize
        made = 0 if self.settings.on_host or self.settings.resident else self._factored
        own = shard.numel * self.accumulation_dtype.itemsize
        if self.settings.kernel == "torch" and not self.settings.on_host:
            longest = max(run.stop - run.start for run in shard.runs)
            if self.accumulation_dtype != torch.float32:  # else the rule works in the gradient itself
                made += 4 * (min(self._tile_numel, longest) if self.rule.elementwise else longest)
            if not self.rule.elementwise:  # the estimate of the second moment of the largest slice
                made += 4 * max(segment.numel for segment in shard.segments)
        sent = 0
        if self.stage in (1, 2) and shard.world > 1:
            sent = max(self._packed(shard, bucket) for bucket in shard.buckets(self.settings.publish_numel))
        return (gradients, new + made) if own + made >= sent else (gradients - own, new + sent)

    def _packed(self, shard: BlockShard, bucket: range) -> int:
        span = shard.span(bucket)
        return (span.stop - span.start) * shard.world * self.params[shard.fqns[bucket[0]]].element_size()

    # Gradients.

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """Of averaged gradients."""
        several = self.micro_steps > 1 or not self.deepspeed.managed_gradient_accumulation
        asked = self.deepspeed.grad_accum_dtype
        return accumulation_dtype(None if asked is None else DtypeEnum(asked).value, self.dtype, several)

    def gradient_bytes(self, block: int, order: Sequence[str]) -> GradientBytes:
        """Runs the real reducer over fake gradients of a block (and the always-active parameters).

        Args:
            order: fqns in the order in which backward completes their gradients.
        """
        shards = [self.shards[block]] if self.always is None else [self.shards[block], self.always]
        with self.model.mode:
            meter = StorageMeter()
            reducer = self._reducer()
            with meter:
                reducer.open(shards)
                for micro_step in range(min(self.micro_steps, 2)):
                    last = micro_step + 1 == min(self.micro_steps, 2)
                    reducer.sent = 0
                    before, events = meter.current, []
                    for fqn in order:
                        events.append(self._take(reducer, meter, self.params[fqn]))
                    meter.restart()
                    reducer.finish_backward(last)
                    finish = meter.peak
                results = [reducer.take(shard)[0] for shard in shards]
                after = sum(result.nbytes for result in results)
            for fqn in order:
                self.params[fqn].grad = None
        return GradientBytes(before, tuple(events), finish, after, reducer.sent)

    def _take(self, reducer: _SilentReducer, meter: StorageMeter, param: torch.nn.Parameter) -> tuple[int, int]:
        meter.restart()
        if param.grad is None:
            param.grad = torch.empty_like(param)
        reducer.on_gradient(param)
        return meter.peak, meter.current

    def _reducer(self) -> _SilentReducer:
        config = self.deepspeed
        communication = config.communication_data_type or self.dtype
        predivide = float(self.world) if config.prescale_gradients else config.gradient_predivide_factor
        return _SilentReducer(
            stage=self.stage, group=None, world=self.world, averaging=Averaging(communication, predivide, True),
            accumulation_dtype=self.accumulation_dtype, bucket_numel=self.zero.reduce_bucket_size,
            overlap=bool(self.zero.overlap_comm),
        )  # fmt: skip

    # Traffic of one optimizer step.

    def bus_bytes(self, shard: BlockShard) -> tuple[int, int]:
        """State and gradients to the device, and back to the host."""
        if self.settings.resident:
            return 0, 0
        if self.settings.on_host:
            return shard.numel * shard.dtype.itemsize, shard.numel * self.accumulation_dtype.itemsize
        back = self.state_bytes(shard)
        master = self.storage.shapes(shard, self.rule, self.groups).get("master")
        again = 0 if self.rule.elementwise or master is None else master[0] * master[1].itemsize
        return back + again, back

    def published_bytes(self, block: int) -> int:
        """Handed to collectives by the update of a block (and the always-active parameters): new weights, and sums of
        factored moments."""
        shards = [self.shards[block]] if self.always is None else [self.shards[block], self.always]
        total = 0
        if self.world > 1:  # stage 3 gathers them again after each update
            sizes = self.sizes
            total += sum(sizes[name].padded_bytes for name in self.persistent)
        for shard in shards:
            if shard.world > 1:
                total += sum(tensor.nbytes for tensor in self.extra(shard).values())
            if shard.world > 1 and self.stage < 3:
                total += sum(self._packed(shard, bucket) for bucket in shard.buckets(self.settings.publish_numel))
        return total


class _SilentReducer(GradientReducer):
    """The training run's reducer, but nothing is sent."""

    sent = 0

    def _send(self, packed: torch.Tensor, reduced: torch.Tensor) -> Any:
        self.sent += packed.nbytes
        return _Done()


class _Done:
    def wait(self) -> None:
        pass
