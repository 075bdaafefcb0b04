"""From a checkpoint into a run of whatever ranks, stage, blocks and form of state; a rank reads its slices alone."""

from __future__ import annotations

from typing import Any

import torch

from hift_ds.checkpoint.content import (
    RunState,
    extra_name,
    master_form,
    moment_form,
    phase_of,
    rotation_of,
    scale_of,
    scales_of,
    slots_of,
)
from hift_ds.checkpoint.saved import RANGE, Saved
from hift_ds.checkpoint.tensor_files import CODES
from hift_ds.shards import full_numel, is_partitioned, slice_numel
from hift_ds.state.formats import SCALE_SUFFIX
from hift_ds.state.unit_state import UnitState


def same_weights(run: RunState, saved: Saved) -> bool:
    """Whether DeepSpeed's file has the model weights as this run wants them."""
    if 3 in (run.stage, saved.manifest["zero_stage"]):
        return False
    return all(
        (saved.parameters[fqn]["master"], saved.parameters[fqn]["dtype"])
        == (master_form(state, index), CODES[state.shard.params[index].dtype])
        for state in run.states for index, fqn in enumerate(state.shard.fqns) if fqn in saved.parameters
    )  # fmt: skip


@torch.no_grad()
def load_weights(
    module: torch.nn.Module, run: RunState, saved: Saved, rank: int, world: int
) -> None:
    """The model weights of all parameters: whole ones, at stage 3 this rank's slices. Not collective.

    Args:
        module: The model, whose names are the checkpoint's.
        run: Its trained parameters'.
        saved: Has them.
        rank: This one of the data-parallel group.
        world: Its size.
    """
    states = {fqn: state for state in run.states for fqn in state.shard.fqns}
    for name, param in module.named_parameters():
        weights, start = held_weights(param, rank, world)
        for first in range(0, weights.numel(), RANGE):
            part = weights[first : first + RANGE]
            span = (start + first, start + first + part.numel())
            if name in saved.parameters:
                master = saved.master(name, *span)
                part.copy_(states[name].rounded(master) if name in states else master)
            elif name in saved.manifest["frozen"]:
                part.copy_(saved.frozen(name, *span))


def held_weights(param: torch.nn.Parameter, rank: int, world: int) -> tuple[torch.Tensor, int]:
    """The weights of a parameter that this rank holds, 1-D, and where in the flattened parameter they begin."""
    if not is_partitioned(param):
        return param.data.view(-1), 0
    numel = full_numel(param)
    each = slice_numel(numel, world)
    start = min(rank * each, numel)
    return param.ds_tensor.data.view(-1)[: min(each, numel - start)], start


@torch.no_grad()
def load_states(run: RunState, saved: Saved) -> None:
    """Masters, moments and steps; the model weights are there already. Not collective.

    What the checkpoint has no state of begins anew. Another form of state is converted.
    """
    for state in run.states:
        state.reset()
        state.refresh_master()
        for index, fqn in enumerate(state.shard.fqns):
            if fqn in saved.parameters:
                _load_master(state, index, saved)
                for key in () if saved.plain else state.extra:
                    name = extra_name(state, key)
                    if name.startswith(f"{fqn}::"):
                        state.extra[key].view(-1).copy_(saved.factored(fqn, name))
        for slot in slots_of(state):
            if _same_codes(state, saved):
                _copy_codes(state, slot, saved)
            else:
                _load_moments(state, slot, saved)
        # Where parameters of a unit have had different numbers of updates: the least corrects most.
        steps = [saved.parameters[fqn]["step"] if fqn in saved.parameters else 0 for fqn in state.shard.fqns]
        state.step, state.torn, state.forgotten = min(steps, default=0), False, False


def _load_master(state: UnitState, index: int, saved: Saved) -> None:
    if state.master is None:
        return
    segment = state.shard.segments[index]
    for first in range(0, segment.numel, RANGE):
        last = min(first + RANGE, segment.numel)
        value = saved.master(segment.fqn, segment.start + first, segment.start + last)
        state.write_master(index, first, value)


def _same_codes(state: UnitState, saved: Saved) -> bool:
    """Whether the 8-bit moments of this unit are the checkpoint's, group by group: the same parameters, cut alike."""
    shard, parameters = state.shard, saved.parameters
    if moment_form(state) != "int8" or shard.world != saved.manifest["state_ranks"]:
        return False
    if not all(fqn in parameters and parameters[fqn]["moments"] == "int8" for fqn in shard.fqns):
        return False
    units = {(parameters[fqn]["file"], parameters[fqn]["unit"]) for fqn in shard.fqns}
    then = sum((other["file"], other["unit"]) in units for other in parameters.values())
    return (len(units), then) == (1, len(shard.fqns)) and all(
        saved.phase(fqn, shard.rank) == phase_of(shard, index) for index, fqn in enumerate(shard.fqns)
    )


def _copy_codes(state: UnitState, slot: str, saved: Saved) -> None:
    for index, segment in enumerate(state.shard.segments):
        here = slice(segment.offset, segment.offset + segment.numel)
        stop = segment.start + segment.numel
        state.slots[slot][here].copy_(saved.stored(segment.fqn, f"::{slot}", segment.start, stop))
        scales_of(state, index, slot).copy_(saved.scales(segment.fqn, slot, state.shard.rank))


def _load_moments(state: UnitState, slot: str, saved: Saved) -> None:
    shard, target = state.shard, state.slots[slot]
    in_codes = slot + SCALE_SUFFIX in state.slots
    values = torch.zeros(shard.numel) if in_codes else target
    for segment in shard.segments:
        if segment.fqn in saved.parameters and slot in saved.parameters[segment.fqn]["slots"]:
            here = slice(segment.offset, segment.offset + segment.numel)
            stop = segment.start + segment.numel
            values[here].copy_(saved.moment(segment.fqn, slot, segment.start, stop))
    if in_codes:
        state.encode(slot, values)


def load_position(run: RunState, saved: Saved) -> None:
    """Rotation, rates, hyper-parameters of groups and loss scale; another rotation begins at a cycle's start."""
    facts = saved.manifest
    run.rotation.step = facts["step"]
    if not same_rotation(run, saved):
        then = len(facts["rotation"]["order"]) * facts["rotation"]["steps_per_block"]
        run.rotation.step = -(-facts["step"] // then) * run.rotation.steps_per_cycle
    run.rate.rates = facts["rates"]
    for group, values in zip(run.param_groups, facts["param_groups"], strict=True):
        group.update({key: _as_now(group.get(key), value) for key, value in values.items()})
    scale = facts["loss_scaler"]
    if scale.keys() == scale_of(run).keys():
        vars(run.loss_scaler).update(scale)


def same_rotation(run: RunState, saved: Saved) -> bool:
    """Whether the coming step's turn is the one that the checkpoint's run would have had."""
    return rotation_of(run) == saved.manifest["rotation"]


def _as_now(present: Any, value: Any) -> Any:
    """JSON has lists for tuples and numbers for tensors."""
    if isinstance(present, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(present, torch.Tensor):
        return torch.full_like(present, value)
    return value

