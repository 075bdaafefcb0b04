"""Full fine-tuning by DeepSpeed's own optimizer: the same model, stage, precision and workload, for comparison.

Gradients are in the model's dtype; masters and the rule's state in fp32; each divided by the ranks from the stage on
that shards it. Seen in DeepSpeed 0.19.8: from stage 1 on there are masters beside fp32 weights, too; the update of
16-bit weights copies the gradients to fp32; reduction buckets have their full size whatever the model's is, two where
reduction overlaps with backward (stages 1 and 2); stage 0 flattens what it reduces, at most `FLATTENED` elements at a
time.

Source: ZeRO, arXiv 1910.02054, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hift_ds.memory.figures import Figures
from hift_ds.memory.trace import FETCH, GRADIENT

FLATTENED = 500_000_000

if TYPE_CHECKING:
    from hift_ds.memory.layout import Layout
    from hift_ds.memory.plan import Planner
    from hift_ds.memory.request import Request


def full_figures(planner: Planner, request: Request, layout: Layout) -> tuple[Figures, int]:
    """The figures, and bytes of a rank's host memory."""
    frozen = set(layout.plan.frozen)
    trained = tuple(fqn for fqn in layout.params if fqn not in frozen)
    numel = sum(layout.params[fqn].numel() for fqn in trained)
    whole = sum(layout.params[fqn].nbytes for fqn in trained)
    state = _state_bytes(layout, trained)
    on_host = layout.settings.on_host
    events = planner.events(request, trained)
    gathered = layout.gathered(events)
    shared = layout.stage >= 2 and layout.world > 1
    buckets = _bucket_bytes(layout)
    held = (whole // layout.world if shared else 0) + buckets
    weights, worst = 0, (-1, 0, 0, 0, "forward")
    for index, event in enumerate(events):
        phase = "forward" if event.forward else "backward"
        at_event = gathered.during[index] if event.kind == FETCH else weights
        made = event.gradient
        worst = max(worst, (weights + held + event.peak, weights, held + made, event.peak - made, phase),
                    (at_event + held + event.current, at_event, held, event.current, phase))  # fmt: skip
        if event.kind == GRADIENT and not shared:
            held += sum(layout.params[name].nbytes for name in event.names)
        weights = gathered.after[index]
    flattened = min(numel, FLATTENED) * layout.dtype.itemsize if layout.stage == 0 and layout.world > 1 else 0
    worst = max(worst, (held + flattened, 0, held + flattened, 0, "backward"))
    copied = 4 * numel // (layout.world if layout.stage >= 1 else 1) if layout.dtype != torch.float32 else 0
    updated = held - (buckets if layout.stage < 3 else 0) + copied
    worst = max(worst, (updated, 0, updated, 0, "update"))
    _, weights, gradients, activations, phase = worst
    shard = numel // (layout.world if layout.stage >= 1 else 1)
    element = layout.dtype.itemsize
    return Figures(
        "full fine-tuning", numel, layout.weights + weights, 0 if on_host else state, gradients, activations, phase,
        state if on_host else 0, shard * element if on_host else 0, shard * element if on_host else 0,
        _network_bytes(layout, whole, gathered.sent),
    ), state if on_host else 0  # fmt: skip


def _bucket_bytes(layout: Layout) -> int:
    zero = layout.zero
    if layout.stage == 0 or (layout.stage < 3 and not zero.contiguous_gradients):
        return 0
    buffers = 2 if layout.stage < 3 and zero.overlap_comm else 1
    return buffers * zero.reduce_bucket_size * layout.dtype.itemsize


def _state_bytes(layout: Layout, trained: tuple[str, ...]) -> int:
    sharded = whole = 0
    slots = layout.rule.slots(layout.groups[0])
    for shard in [*layout.shards, *([layout.always] if layout.always else [])]:
        whole += sum(tensor.nbytes for tensor in layout.extra(shard).values())
    for fqn in trained:
        param = layout.params[fqn]
        masters = param.dtype != torch.float32 or layout.stage >= 1
        sharded += 4 * param.numel() * (len(slots) + masters)
    return sharded // (layout.world if layout.stage >= 1 else 1) + whole


def _network_bytes(layout: Layout, whole: int, gathered: int) -> int:
    if layout.world == 1:
        return 0
    reduced = whole * (layout.micro_steps if layout.stage >= 2 else 1)
    return reduced + (whole if layout.stage in (1, 2) else 0) + gathered * layout.micro_steps
