"""Bytes per rank by role, counted from tensor sizes: HiFT as it runs, beside full fine-tuning with the same ZeRO stage.

Activations are not counted here. Nothing is measured: these are the sizes of the tensors that exist at the worst moment
of a step, by the layouts of `hift_ds.shards` and of DeepSpeed's ZeRO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hift_ds.shards import full_numel, is_partitioned
from hift_ds.state import extra_bytes, plan_ring

if TYPE_CHECKING:
    from hift_ds.engine import HiFTEngine
    from hift_ds.gradients import GradientReducer
    from hift_ds.optimizer import HiFTOptimizer
    from hift_ds.shards import BlockShard
    from hift_ds.state import BlockState


@dataclass(frozen=True)
class Roles:
    """Bytes of one rank.

    Attributes:
        weights: Model weights on the device.
        gradients: Largest sum of gradients alive on the device.
        state: Master weights and optimizer state on the device.
        host: Master weights and optimizer state in host memory.
    """

    weights: int
    gradients: int
    state: int
    host: int

    @property
    def device(self) -> int:
        """Everything on the device: an upper bound, as gradients and state peak one after the other."""
        return self.weights + self.gradients + self.state


def hift_roles(engine: HiFTEngine) -> Roles:
    """The roles of this rank's run, for its worst block."""
    optimizer = engine.optimizer
    always = [] if optimizer.always is None else [optimizer.always]
    resident = sum(tensor.nbytes for state in always for tensor in state.all_tensors())
    return Roles(
        weights=_weight_bytes(engine),
        gradients=max(_gradient_bytes(engine, state) for state in optimizer.states),
        state=resident + _state_bytes(optimizer),
        host=sum(state.host_bytes for state in optimizer.states),
    )


def full_roles(engine: HiFTEngine) -> Roles:
    """Full fine-tuning of the same parameters with DeepSpeed's own optimizer at the same stage and precision.

    Per parameter: the gradient in the model's dtype, and in fp32 a master weight (unless the weights are fp32 and the
    stage is 0) and each state tensor of the update rule; divided by the ranks from the stage on that shards them.
    Source: ZeRO, arXiv 1910.02054, section 3.
    """
    optimizer, stage = engine.optimizer, engine.optimizer.settings.stage
    world = optimizer.settings.world
    numel = gradients = state = 0
    for block in optimizer._all_states():
        params = block.shard.params
        count = sum(full_numel(param) for param in params)
        numel += count
        gradients += sum(full_numel(param) * param.element_size() for param in params)
        names = {slot for run in block.shard.runs for slot in block.rule.slots(optimizer.param_groups[run.group])}
        masters = stage >= 1 or any(param.dtype != torch.float32 for param in params)
        state += 4 * count * (len(names) + masters)
    return Roles(
        weights=_weight_bytes(engine),
        gradients=gradients // (world if stage >= 2 else 1),
        state=state // (world if stage >= 1 else 1),
        host=0,
    )


def _weight_bytes(engine: HiFTEngine) -> int:
    total = 0
    for param in engine.module.parameters():
        total += param.ds_tensor.nbytes if is_partitioned(param) else param.nbytes
    return total + sum(buffer.nbytes for buffer in engine.module.buffers())


def _gradient_bytes(engine: HiFTEngine, state: BlockState) -> int:
    always, reducer = engine.optimizer.always, engine.optimizer.reducer
    # From the second micro step on, what the first has reduced is there before the first bucket is.
    accumulates = reducer.at_once and engine.gradient_accumulation_steps() > 1
    shards = [state.shard] if always is None else [state.shard, always.shard]
    return sum(_reduction_bytes(shard, reducer, accumulates) for shard in shards)


def _reduction_bytes(shard: BlockShard, reducer: GradientReducer, accumulates: bool) -> int:
    """Largest sum, from bucket to bucket of `GradientReducer`, of gradients, buckets on their way and the shard."""
    averaged = shard.numel * reducer.accumulation_dtype.itemsize
    if reducer.world == 1:
        return averaged + max(full_numel(param) * param.element_size() for param in shard.params)
    whole, packed, on_the_way = [], [], []
    for bucket in shard.buckets(reducer.bucket_numel):
        params = [shard.params[index] for index in bucket]
        # At stages 0 and 1 gradients wait for the boundary, in the dtype that they accumulate in.
        sizes = [p.element_size() if reducer.at_once else reducer.accumulation_dtype.itemsize for p in params]
        whole.append(sum(full_numel(param) * size for param, size in zip(params, sizes, strict=True)))
        span = shard.span(bucket)
        part = (span.stop - span.start) * reducer.averaging.dtype.itemsize
        packed.append(part * shard.world)
        on_the_way.append(part * (shard.world + (reducer.stage > 0)))  # stage 0 reduces in place
    peak, limit = 0, reducer.max_in_flight
    for index in range(len(whole)):
        earlier = sum(on_the_way[max(0, index - limit) : index])
        later = 0 if reducer.at_once else sum(whole[index + 1 :])
        packing = whole[index] + packed[index] + (averaged if accumulates or index > limit else 0)
        sending = on_the_way[index] + (averaged if accumulates or index >= limit or index + 1 == len(whole) else 0)
        peak = max(peak, earlier + later + max(packing, sending))
    return peak


def _state_bytes(optimizer: HiFTOptimizer) -> int:
    """On an accelerator: the largest block's new weights, the ring (or all state), an eager rule's fp32 gradient."""
    settings, states = optimizer.settings, optimizer.states
    weights = max(state.shard.numel * state.shard.dtype.itemsize for state in states)
    if settings.on_host:
        return weights
    if settings.resident:
        return weights + sum(tensor.nbytes for state in states for tensor in state.all_tensors())
    shapes = [(s.shard, s.storage.shapes(s.shard, s.rule, optimizer.param_groups)) for s in states]
    beside = extra_bytes(state.extra for state in states)
    plan = plan_ring(shapes, settings.ring_bytes, beside, settings.card_bytes)
    longest = max(run.stop - run.start for state in states for run in state.shard.runs)
    gradient = min(plan.tile_numel, longest) if optimizer.rule.elementwise else longest
    ring = plan.num_slots * plan.slot_bytes + beside
    return weights + ring + (4 * gradient if settings.kernel == "torch" else 0)
