"""Full fine-tuning by DeepSpeed's own optimizer: the same model, stage, precision and workload, for comparison.

Gradients are in the model's dtype; masters and the rule's state in fp32; each divided by the ranks from the stage on
that shards them. Seen in DeepSpeed 0.19.8, operation by operation:

- from stage 1 on there are masters beside fp32 weights, too;
- a rank's part of the gradients is a tensor of its own, beside all gradients at stage 1, twice where stage 2 adds up
  micro steps, and for good at stage 3;
- the update flattens that part and then copies it to fp32 (at stage 3 for `sub_group_size` elements at a time); at
  stage 0 it copies every gradient, and for FusedAdam flattens the copies;
- torch's own optimizers make temporary tensors as large as what they update (`_temporaries`);
- buckets have their full size whatever the model's is, two where reduction overlaps with backward (stages 1 and 2);
  stage 0 flattens what it reduces, at most `FLATTENED` elements at a time.

Source: ZeRO, arXiv 1910.02054, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hift_ds.memory.figures import Figures, Moment
from hift_ds.memory.gathering import Gathered
from hift_ds.memory.layout import Layout
from hift_ds.memory.trace import FETCH, GRADIENT, Event

FLATTENED = 500_000_000


def full_figures(layout: Layout, events: Sequence[Event]) -> tuple[Figures, int]:
    """The figures, and bytes of a rank's host memory.

    Args:
        events: A micro step in which everything is trained.
    """
    trained = layout.trained
    numel, element = sum(layout.params[fqn].numel() for fqn in trained), layout.dtype.itemsize
    on_host = layout.config.home == "host"
    state = _state_bytes(layout, trained)
    gathered = layout.gathered(events)
    worst = max(full_moments(layout, events, gathered), key=lambda moment: moment.nbytes)
    shard = numel // (layout.config.world if layout.config.stage >= 1 else 1)
    return Figures(
        "full fine-tuning", numel, layout.weights + worst.weights, 0 if on_host else state, worst.gradients,
        worst.activations, worst.phase, state if on_host else 0, shard * element if on_host else 0,
        shard * element if on_host else 0, _network_bytes(layout, numel * element, gathered.sent),
    ), state if on_host else 0  # fmt: skip


def full_moments(layout: Layout, events: Sequence[Event], gathered: Gathered) -> Iterator[Moment]:
    """Moments of a step, among them the worst of each phase.

    Args:
        events: A micro step in which everything is trained.
        gathered: What stage 3 gathers in it.
    """
    sizes = [layout.params[name].numel() for event in events if event.kind == GRADIENT for name in event.names]
    numel, weights = sum(sizes), 0
    held, at_the_end = _held(layout, events, numel)
    for index, event in enumerate(events):
        phase = "forward" if event.forward else "backward"
        before, during = held[index]
        yield Moment(phase, weights, before + event.gradient, event.peak - event.gradient)
        if event.kind == FETCH:
            yield Moment(phase, gathered.during[index], before, event.current)
        yield Moment(phase, weights, during, event.current)
        weights = gathered.after[index]
    yield Moment("backward", gradients=at_the_end)
    yield Moment("update", gradients=_update_bytes(layout, numel, _temporaries(layout, sizes)))


def _held(layout: Layout, events: Sequence[Event], numel: int) -> tuple[list[tuple[int, int]], int]:
    """Bytes of gradients that stay, before each event and at most right after it; and at the end of backward."""
    stage, element = layout.config.stage, layout.dtype.itemsize
    part, buckets, size = _part_bytes(layout, numel), _bucket_bytes(layout), layout.config.zero.reduce_bucket_size
    several = layout.config.micro_steps > 1
    at_once = stage >= 2 or (stage == 1 and layout.config.zero.overlap_comm)  # else after backward
    if stage < 2:  # gradients stay where autograd leaves them; at the boundary those reduced at once go
        held, stays = several * (numel * element + buckets), not (several or at_once)
    else:
        held, stays = part + buckets if stage == 3 else several * part, False
    found: list[tuple[int, int]] = []
    begun, parted, pending, number = (several and stage == 1) or stage in (0, 3), stage in (0, 3), 0, 0
    for event in events:
        before = during = held
        if event.kind == GRADIENT:
            counts = [layout.params[name].numel() for name in event.names]
            if not begun:
                held, begun = held + buckets, True
            if at_once and pending and pending + sum(counts) > size:  # a bucket is full
                if not parted:
                    held, parted = held + part, True
                during = held + _flattened_at_stage_3(layout, pending, number) + sum(counts) * element
                pending = number = 0
            held += stays * sum(counts) * element
            pending, number = pending + sum(counts), number + len(counts)
        found.append((before, max(during, held)))
    if stage == 0:
        return found, held + min(numel, FLATTENED) * element
    return found, held + (0 if parted else part) + _flattened_at_stage_3(layout, pending, number)


def _flattened_at_stage_3(layout: Layout, numel: int, number: int) -> int:
    """The copy of a bucket of `number` gradients in the order of the ranks' parts; a lone one is sent as it is."""
    return numel * layout.dtype.itemsize if layout.config.stage == 3 and layout.config.world > 1 and number > 1 else 0


def _part_bytes(layout: Layout, numel: int) -> int:
    """A rank's part of the gradients."""
    if layout.config.stage == 0 or layout.config.home == "host":
        return 0
    return numel // layout.config.world * layout.dtype.itemsize


def _update_bytes(layout: Layout, numel: int, temporaries: int) -> int:
    """Gradients and their copies, and what the optimizer makes."""
    element, part = layout.dtype.itemsize, _part_bytes(layout, numel)
    cast = 4 if element != 4 else 0
    if layout.config.home == "host":
        return _bucket_bytes(layout) if layout.config.stage == 3 else 0
    if layout.config.stage == 0:
        flattened = cast * numel if _fused(layout) and layout.rule.name == "adamw" else 0
        return (element + cast) * numel + max(flattened, temporaries)
    numel //= layout.config.world
    if layout.config.stage == 3:
        numel = min(numel, layout.config.zero.sub_group_size)
    copies = (element + cast) * numel
    if layout.config.stage == 3:
        return part + _bucket_bytes(layout) + max(copies, 4 * numel + temporaries)
    parts = 2 if layout.config.stage == 2 and layout.config.micro_steps > 1 else 1
    return max(parts * part + copies, 4 * numel + temporaries)


def _fused(layout: Layout) -> bool:
    """Whether DeepSpeed makes the update with a kernel of its own."""
    switches = layout.config.optimizer_params
    return layout.rule.name in ("adamw", "lion") and not switches.get("torch_adam")


def _temporaries(layout: Layout, sizes: Sequence[int]) -> int:
    """Bytes of the fp32 tensors that torch's AdamW, Adagrad and SGD make while they update parameters.

    On CUDA they update all tensors of a group at once (`foreach`), on a CPU one after the other; from stage 1 on all
    parameters of a rank (of a sub-group) are one tensor. Counted in torch 2.13's torch/optim.
    """
    params, on_cpu = layout.config.optimizer_params, layout.config.device_type == "cpu"
    if _fused(layout) or params.get("fused"):
        return 0
    name = layout.rule.name
    decayed = bool(params.get("weight_decay")) and name != "adamw"  # a gradient with decay in it
    # On CUDA Adagrad works in that gradient, or makes another tensor.
    number = {"adamw": 2, "adagrad": 1 + decayed} if on_cpu else {"adamw": 1, "adagrad": 2}
    if layout.config.stage == 0:
        tensor = max(sizes) if on_cpu else sum(sizes)
    else:
        tensor = sum(sizes) // layout.config.world
        if layout.config.stage == 3:
            tensor = min(tensor, layout.config.zero.sub_group_size)
    return 4 * tensor * number.get(name, decayed)


def _bucket_bytes(layout: Layout) -> int:
    zero = layout.config.zero
    if layout.config.stage == 0 or (layout.config.stage < 3 and not zero.contiguous_gradients):
        return 0
    buffers = 2 if layout.config.stage < 3 and zero.overlap_comm else 1
    return buffers * zero.reduce_bucket_size * layout.dtype.itemsize


def _state_bytes(layout: Layout, trained: tuple[str, ...]) -> int:
    """Masters and moments of a rank."""
    sharded = whole = 0
    slots = layout.rule.slots(layout.groups[0])
    for shard in [*layout.units, *([layout.always] if layout.always else [])]:
        whole += sum(tensor.nbytes for tensor in layout.extra(shard).values())
    for fqn in trained:
        param = layout.params[fqn]
        masters = param.dtype != torch.float32 or layout.config.stage >= 1
        sharded += 4 * param.numel() * (len(slots) + masters)
        if layout.rule.name == "adagrad" and masters and layout.config.stage < 3 and layout.config.home != "host":
            whole += param.nbytes  # torch's Adagrad makes sums for the weights it is given, before there are masters
    return sharded // (layout.config.world if layout.config.stage >= 1 else 1) + whole


def _network_bytes(layout: Layout, whole: int, gathered: int) -> int:
    if layout.config.world == 1:
        return 0
    reduced = whole * (layout.config.micro_steps if layout.config.stage >= 2 else 1)
    return reduced + (whole if layout.config.stage in (1, 2) else 0) + gathered * layout.config.micro_steps
