"""What a checkpoint holds of a run: its facts for the manifest, and a tensor for each parameter and slot.

A file `hift_rank_R_block_B.safetensors` has rank R's slices of the parameters of block B: elements R * c to (R + 1) * c
of the flattened parameter, c = ceil(numel / ranks), in the parameter's shape where the slice is all of it. Names:

    FQN             the master weight: fp32, or the model weight where that is the master or its high half
    FQN::remainder  the low 16 bits of a `split16` master
    FQN::SLOT       a moment by torch's name (exp_avg, ...), factored ones too, which are whole in rank 0's file
    FQN::SLOT_scale scales of an int8 moment: those of the groups of 256 elements that the slice meets
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hift_ds.checkpoint.tensor_files import CODES, sum_of
from hift_ds.rotation.rotation import Rotation
from hift_ds.rotation.schedule import CycleScheduler, DelayedRate
from hift_ds.shards import UnitShard, slice_numel
from hift_ds.state.formats import GROUP, SCALE_SUFFIX
from hift_ds.state.unit_state import UnitState

REMAINDER, PHASES = "::remainder", "phases"


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds of a run; a load changes it in place.

    Attributes:
        blocks: Of each block, its units'.
        always: Of what is always active, or `None`.
        rule: Name of the update rule.
        stage: ZeRO stage.
        world: Ranks of the data-parallel group.
        scheduler: What the engine steps, or `None`.
    """

    blocks: Sequence[Sequence[UnitState]]
    always: UnitState | None
    rule: str
    stage: int
    world: int
    rotation: Rotation
    rate: DelayedRate
    param_groups: list[dict[str, Any]]
    loss_scaler: Any
    scheduler: Any

    @property
    def states(self) -> list[UnitState]:
        """Of the units, then of what is always active."""
        return [state for states in self.parts.values() for state in states]

    @property
    def parts(self) -> dict[str, Sequence[UnitState]]:
        """By the part of a file's name: of each block, and of what is always active."""
        always = {} if self.always is None else {"always": [self.always]}
        return {**{f"block_{index}": units for index, units in enumerate(self.blocks)}, **always}

    @property
    def state_ranks(self) -> int:
        """Ranks that share state; at stage 0 every one has all."""
        return self.states[0].shard.world

    @property
    def rank(self) -> int:
        """This one, of those that share state."""
        return self.states[0].shard.rank


def file_name(rank: int, part: str = "") -> str:
    """Of a rank's tensors of a part (`RunState.parts`); without one, of what else is a rank's own."""
    return f"hift_rank_{rank}{'_' if part else ''}{part}.safetensors"


def facts(run: RunState) -> dict[str, Any]:
    """What the manifest says of a run, as JSON."""
    return {
        "zero_stage": run.stage,
        "ranks": run.world,
        "state_ranks": run.state_ranks,
        "rule": run.rule,
        "parameters": {
            fqn: {**described, "file": part, "unit": unit} for part, states in run.parts.items()
            for unit, state in enumerate(states) for fqn, described in _parameters(state)
        },
        "rotation": rotation_of(run),
        "step": run.rotation.step,
        "rates": run.rate.rates,
        "param_groups": [_plain(group) for group in run.param_groups],
        "loss_scaler": scale_of(run),
        "lr_scheduler": schedule_name(run.scheduler),
    }  # fmt: skip


def scale_of(run: RunState) -> dict[str, Any]:
    """The loss scaler's attributes."""
    return {key: value for key, value in vars(run.loss_scaler).items() if isinstance(value, (bool, int, float))}


def rotation_of(run: RunState) -> dict[str, Any]:
    """What decides whose turn a step is."""
    return {
        "order": list(run.rotation.order),
        "steps_per_block": run.rotation.steps_per_block,
        "blocks": [[fqn for state in units for fqn in state.shard.fqns] for units in run.blocks],
    }


def _parameters(state: UnitState) -> Iterable[tuple[str, dict[str, Any]]]:
    shard = state.shard
    for run in shard.runs:
        for segment in run.segments:
            index = shard.fqns.index(segment.fqn)
            yield segment.fqn, {
                "shape": list(segment.shape), "dtype": CODES[shard.params[index].dtype],
                "slice": slice_numel(segment.shape.numel(), shard.world),
                "group": run.group, "master": master_form(state, index), "slots": slots_of(state),
                "moments": moment_form(state), "step": state.step,
            }  # fmt: skip


def master_form(state: UnitState, index: int) -> str:
    """`fp32` (weights that are their own master, too), `split16`, or `none`."""
    if state.master is not None:
        return "fp32" if state.master.dtype == torch.float32 else "split16"
    return "fp32" if state.shard.params[index].dtype == torch.float32 else "none"


def moment_form(state: UnitState) -> str:
    """Of the slots that are as long as the shard."""
    return state.storage.state.moments


def slots_of(state: UnitState) -> list[str]:
    """The rule's slots of a unit, by torch's names."""
    return [name for name in state.slots if not name.endswith(SCALE_SUFFIX)]


def schedule_name(scheduler: Any) -> str | None:
    """How an error says what kind of schedule a run has."""
    if isinstance(scheduler, CycleScheduler):
        return f"{type(scheduler.scheduler).__name__} with hift.lr_update 'paper'"
    return None if scheduler is None else type(scheduler).__name__


def tensors_of(state: UnitState) -> dict[str, torch.Tensor]:
    """This rank's tensors of a unit, settled: views, no copies."""
    found: dict[str, torch.Tensor] = {}
    shard = state.shard
    for index, (fqn, segment) in enumerate(zip(shard.fqns, shard.segments, strict=True)):
        here = slice(segment.offset, segment.offset + segment.numel)
        shape = segment.shape if segment.numel == segment.shape.numel() else (segment.numel,)
        source = shard.weight_slice(index) if state.master is None or state.weights_count else state.master[here]
        found[fqn] = source.view(shape)
        if master_form(state, index) == "split16":
            assert state.master is not None
            found[fqn + REMAINDER] = state.master[here].view(shape)
        for slot in slots_of(state):
            found[f"{fqn}::{slot}"] = state.slots[slot][here].view(shape)
            if slot + SCALE_SUFFIX in state.slots:
                found[f"{fqn}::{slot}{SCALE_SUFFIX}"] = scales_of(state, index, slot)
    if shard.rank == 0:
        found.update((extra_name(state, key), tensor) for key, tensor in state.extra.items())
    return found


def sums_of_weights(states: Iterable[UnitState]) -> dict[str, int]:
    """By name, of the tensors that are weights of the model itself, into which users may write."""
    found = {}
    for state in states:
        if state.weights_count:
            tensors = tensors_of(state)
            found.update({fqn: sum_of(tensors[fqn]) for fqn in state.shard.fqns})
    return found


def extra_name(state: UnitState, key: str) -> str:
    """Of a tensor that is not shaped like the shard, whose key is "<fqn>.<slot>"."""
    fqn = next(fqn for fqn in state.shard.fqns if key.startswith(f"{fqn}.") and "." not in key[len(fqn) + 1 :])
    return f"{fqn}::{key[len(fqn) + 1 :]}"


def run_index(shard: UnitShard, index: int) -> int:
    """Of the run that a parameter lies in."""
    offset = shard.segments[index].offset
    found = (i for i, run in enumerate(shard.runs) if run.start <= offset < run.stop)
    return next(found, len(shard.runs) - 1)  # a parameter without elements at the very end


def scales_of(state: UnitState, index: int, slot: str) -> torch.Tensor:
    """Scales of the groups that a parameter's slice meets, a view."""
    shard, segment = state.shard, state.shard.segments[index]
    number = run_index(shard, index)
    run = shard.runs[number]
    start = segment.offset - phase_of(shard, index)
    stop = min(-(-(segment.offset + segment.numel - run.start) // GROUP) * GROUP + run.start, run.stop)
    return state.tile_of(number, slice(start, max(start, stop)))[slot + SCALE_SUFFIX]


def phase_of(shard: UnitShard, index: int) -> int:
    """Elements of the slice's first group that lie before it."""
    return (shard.segments[index].offset - shard.runs[run_index(shard, index)].start) % GROUP


def phases(states: Iterable[UnitState]) -> dict[str, str]:
    """A file's metadata: where in their groups the slices of int8 moments begin."""
    found = {
        fqn: phase_of(state.shard, index) for state in states if moment_form(state) == "int8"
        for index, fqn in enumerate(state.shard.fqns)
    }  # fmt: skip
    return {PHASES: json.dumps(found)} if found else {}


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group's hyper-parameters as JSON; what JSON has no word for is left out."""
    found = {}
    for key, value in group.items():
        value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if key == "params":
            continue
        try:
            json.dumps(value)
        except TypeError:
            continue
        found[key] = value
    return found
