"""Whether a checkpoint fits a run: what is refused before anything is changed, and what is noted."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hift_ds.checkpoint.content import RunState, master_form, moment_form, schedule_name, slots_of
from hift_ds.checkpoint.manifest import FORMAT
from hift_ds.checkpoint.restore import same_rotation
from hift_ds.checkpoint.saved import Saved
from hift_ds.checkpoint.tensor_files import CODES
from hift_ds.rotation.names import shortest, some
from hift_ds.rotation.rewind import CannotRewind, Rewind
from hift_ds.shards import full_shape

WEIGHTS_ALONE = "load its weights alone with load_checkpoint(..., load_module_only=True)"


def require_earlier_format(manifest: Mapping[str, Any], whole: bool) -> None:
    """Raises RuntimeError where more is wanted of an earlier HiFT's checkpoint than its weights, in one file."""
    why = f"the checkpoint has HiFT format {manifest['format']!r}, this version reads {FORMAT}"
    if manifest.get("identity", {}).get("zero_optimization.stage", 3) == 3:
        raise RuntimeError(f"{why}, and at stage 3 its weights lie in shards: resume with the version that wrote it")
    if whole:
        raise RuntimeError(f"{why}: {WEIGHTS_ALONE}")


def require_state_fits(run: RunState, saved: Saved) -> None:
    """What must be the same for masters and moments to keep their meaning.

    Raises:
        RuntimeError: Another rule, other slots or other param groups.
    """
    facts = saved.manifest
    groups = len(facts["param_groups"]), len(run.param_groups)
    rules = (run.rule if saved.plain else facts["rule"], run.rule)
    for what, then, now in (("optimizer.type", *rules), ("number of param groups", *groups)):
        if then != now:
            raise _another(what, repr(then), repr(now))
    for state in run.states:
        for part in state.shard.runs:
            for segment in part.segments:
                before = saved.parameters.get(segment.fqn)
                if before is None:
                    continue
                if before["slots"] != slots_of(state) and not saved.plain:
                    raise _another(
                        "state kept by the update rule, which optimizer.params (momentum) decide",
                        some(before["slots"]) or "none", some(slots_of(state)) or "none",
                    )  # fmt: skip
                if before["group"] != part.group:
                    what = f"division into param groups: {segment.fqn!r} is of another"
                    raise _another(what, f"group {before['group']}", f"group {part.group}")


def notes(run: RunState, saved: Saved) -> Iterator[str]:
    """What differs and is taken over; said once, on rank 0."""
    if saved.plain:
        begun = sum(bool(described["slots"]) for described in saved.parameters.values())
        yield (
            f"a checkpoint of plain DeepSpeed is taken over: masters of {len(saved.parameters)} parameters, moments of "
            f"{begun} of them, and its param groups' rates; a cycle begins"
        )
    else:
        yield from _notes_of_rotation(run, saved)
    fresh, forms = [], set()
    for state in run.states:
        for index, fqn in enumerate(state.shard.fqns):
            before = saved.parameters.get(fqn)
            if before is None or (saved.plain and slots_of(state) and not before["slots"]):
                fresh.append(fqn)
            else:
                then = (before["dtype"], before["master"], before["moments"])
                moments = moment_form(state) if before["slots"] else before["moments"]
                now = (CODES[state.shard.params[index].dtype], master_form(state, index), moments)
                if then != now:
                    forms.add((*then, *now))
    for form in sorted(forms):
        yield "weights, masters and moments are converted, {}, {}, {} -> {}, {}, {}".format(*form)
    if fresh:
        yield f"the checkpoint has no state of {some(fresh)}, which begin anew"


def _notes_of_rotation(run: RunState, saved: Saved) -> Iterator[str]:
    facts = saved.manifest
    cut, wanted = (facts["ranks"], facts["zero_stage"]), (run.world, run.stage)
    if cut != wanted:
        yield (
            f"the checkpoint of {cut[0]} ranks at ZeRO stage {cut[1]} is taken over by {wanted[0]} at stage "
            f"{wanted[1]}: the same weights and state, cut anew"
        )
    now_always = [] if run.always is None else list(run.always.shard.fqns)
    then_always = [fqn for fqn, described in saved.parameters.items() if described["file"] == "always"]
    if set(then_always) != set(now_always):
        others = [fqn for fqn in saved.parameters if fqn not in then_always]
        entries = json.dumps([f"module:{path}" for path in shortest(then_always, others)])
        yield (
            f"always active were {some(then_always) or 'none'}, and are {some(now_always) or 'none'} now: to keep what "
            f'was write "always_active": {entries}'
        )
    if not same_rotation(run, saved):
        yield "blocks, their order or hift.steps_per_block are others than in the checkpoint: a cycle begins"


def require_schedule(manifest: Mapping[str, Any], scheduler: Any) -> None:
    """Raises RuntimeError where the checkpoint was written with another kind of schedule."""
    then, now = manifest["lr_scheduler"], schedule_name(scheduler)
    if now is not None and then != now:
        raise RuntimeError(
            f"the checkpoint was written with another lr_scheduler ({then}; this run: {now}): resume with the same, or "
            "begin this one anew with load_checkpoint(..., load_lr_scheduler_states=False)"
        )


def require_same_kind(saved: Mapping[str, Any], scheduler: Any) -> None:
    """Raises RuntimeError where plain DeepSpeed's state, which names no class, is of another; torch's would take it."""
    alien = {key for key in saved if not key.startswith("_")} - scheduler.state_dict().keys()
    if alien:
        raise RuntimeError(
            f"the checkpoint's lr_scheduler has {some(sorted(alien))}, which this run's ({schedule_name(scheduler)}) "
            "has not: resume with the same, or begin this one anew with load_checkpoint(..., "
            "load_lr_scheduler_states=False)"
        )


def require_schedule_takes(saved: Mapping[str, Any], scheduler: Any, param_groups: list[dict[str, Any]]) -> None:
    """Tries whether a scheduler takes a state; leaves it as it was. One that cannot be put back is not tried.

    Raises:
        RuntimeError: It does not: it is of the same class, but was made otherwise.
    """
    try:
        rewind = Rewind(scheduler, param_groups)
    except CannotRewind:
        return
    try:
        scheduler.load_state_dict(copy.deepcopy(saved))
    except Exception as error:  # whatever it is, it would come half way through the load
        raise RuntimeError(
            f"the lr_scheduler ({schedule_name(scheduler)}) does not take the checkpoint's state ({error!r}): resume "
            "with the same, or begin this one anew with load_checkpoint(..., load_lr_scheduler_states=False)"
        ) from error
    finally:
        rewind.back()


def shapes_in(module: torch.nn.Module) -> dict[str, list[int]]:
    """Of everything in a module's state dict, whole."""
    return {
        name: list(full_shape(value)) for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }  # fmt: skip


def require_module_fits(saved: Mapping[str, Any], module: torch.nn.Module, strict: bool) -> None:
    """Names and shapes; torch copies whatever fits before it says what does not.

    Args:
        saved: Shapes by name.
        module: What takes the weights.
        strict: Every name must be in both.

    Raises:
        RuntimeError: They differ.
    """
    if any(part._load_state_dict_pre_hooks for part in module.modules()):
        return  # they may give keys other names
    present = shapes_in(module)
    differ = saved.keys() ^ present.keys()
    if strict and differ:
        raise RuntimeError(
            f"the checkpoint and the model differ in {len(differ)} names, first {min(differ)!r}: load into the same "
            "model, or pass load_module_strict=False"
        )
    for name in sorted(saved.keys() & present.keys()):
        if list(saved[name]) != present[name]:
            raise RuntimeError(
                f"the checkpoint has {name!r} of shape {tuple(saved[name])}, the model of shape "
                f"{tuple(present[name])}: load into the same model"
            )


def _another(what: str, then: str, now: str) -> RuntimeError:
    return RuntimeError(
        f"the checkpoint was written with another {what} ({then}; this run: {now}): resume with the same, or "
        f"{WEIGHTS_ALONE}"
    )


