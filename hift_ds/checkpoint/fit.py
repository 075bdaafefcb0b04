"""Whether a checkpoint fits a run: what is refused before anything is changed, and what is noted."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hift_ds.checkpoint.content import RunState, master_form, moment_form, schedule_name, slots_of
from hift_ds.checkpoint.manifest import DAMAGED, FORMAT
from hift_ds.checkpoint.restore import same_rotation
from hift_ds.checkpoint.saved import Saved
from hift_ds.checkpoint.tensor_files import CODES
from hift_ds.rotation.names import shortest, some
from hift_ds.rotation.rewind import CannotRewind, Rewind
from hift_ds.shards import full_shape

WEIGHTS_ALONE = "load its weights alone with load_checkpoint(..., load_module_only=True)"


def require_format(manifest: Mapping[str, Any] | None, folder: Path, whole: bool, stage: int) -> bool:
    """Whether a checkpoint has the layout of this version; others serve their weights where one file has them all.

    Raises:
        RuntimeError: More is wanted than it can give.
    """
    if manifest is not None and manifest["format"] == FORMAT:
        return True
    if manifest is None:
        why, sharded = f"checkpoint {str(folder)!r} was not written by HiFT", stage == 3
    else:
        why = f"the checkpoint has HiFT format {manifest['format']!r}, this version reads {FORMAT}"
        sharded = 3 in (stage, manifest.get("identity", {}).get("zero_optimization.stage", 3))
    if manifest is not None and sharded:
        raise RuntimeError(f"{why}, and at stage 3 its weights lie in shards: resume with the version that wrote it")
    if whole:
        raise RuntimeError(f"{why}: {WEIGHTS_ALONE}")
    return False


def require_state_fits(run: RunState, saved: Saved) -> None:
    """What must be the same for masters and moments to keep their meaning.

    Raises:
        RuntimeError: Another rule, other slots or other param groups.
    """
    facts = saved.manifest
    groups = len(facts["param_groups"]), len(run.param_groups)
    for what, then, now in (("optimizer.type", facts["rule"], run.rule), ("number of param groups", *groups)):
        if then != now:
            raise _another(what, repr(then), repr(now))
    for state in run.states:
        for part in state.shard.runs:
            for segment in part.segments:
                before = saved.parameters.get(segment.fqn)
                if before is None:
                    continue
                if before["slots"] != slots_of(state):
                    raise _another(
                        "state kept by the update rule, which optimizer.params (momentum) decide",
                        some(before["slots"]) or "none", some(slots_of(state)) or "none",
                    )  # fmt: skip
                if before["group"] != part.group:
                    what = f"division into param groups: {segment.fqn!r} is of another"
                    raise _another(what, f"group {before['group']}", f"group {part.group}")


def notes(run: RunState, saved: Saved) -> Iterator[str]:
    """What differs and is taken over; said once, on rank 0."""
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
    fresh, forms = [], set()
    for state in run.states:
        for index, fqn in enumerate(state.shard.fqns):
            before = saved.parameters.get(fqn)
            if before is None:
                fresh.append(fqn)
            else:
                then = (before["dtype"], before["master"], before["moments"])
                now = (CODES[state.shard.params[index].dtype], master_form(state, index), moment_form(state))
                if then != now:
                    forms.add((*then, *now))
    for form in sorted(forms):
        yield "weights, masters and moments are converted, {}, {}, {} -> {}, {}, {}".format(*form)
    if fresh:
        yield f"the checkpoint has no state of {some(fresh)}, which begin anew"


def require_schedule(manifest: Mapping[str, Any], scheduler: Any) -> None:
    """Raises RuntimeError where the checkpoint was written with another kind of schedule."""
    then, now = manifest["lr_scheduler"], schedule_name(scheduler)
    if now is not None and then != now:
        raise RuntimeError(
            f"the checkpoint was written with another lr_scheduler ({then}; this run: {now}): resume with the same, or "
            "begin this one anew with load_checkpoint(..., load_lr_scheduler_states=False)"
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


def opened(path: Path) -> dict[str, Any]:
    """DeepSpeed's file of a checkpoint, whose tensors stay on the disk.

    Raises:
        RuntimeError: It is missing or cannot be read.
    """
    if not path.is_file():
        raise RuntimeError(f"checkpoint file {str(path)!r} is missing: the save was cut off; load another tag")
    try:
        # Mapped where it can be; with checkpoint_serialization: false it cannot.
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=False)
    except Exception as error:  # of unpickling, any
        raise RuntimeError(f"checkpoint file {str(path)!r} cannot be read ({error}): {DAMAGED}") from error


def shapes_in(module: torch.nn.Module) -> dict[str, list[int]]:
    """Of everything in a module's state dict, whole."""
    return {
        name: list(full_shape(value)) for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }  # fmt: skip


def shapes_of_file(file: Mapping[str, Any]) -> dict[str, list[int]]:
    """Of everything in a module that plain DeepSpeed has saved."""
    shapes = {name: value.shape for name, value in file["module"].items() if isinstance(value, torch.Tensor)}
    for of_a_group in file.get("param_shapes") or []:  # at stage 3 the module's are placeholders
        shapes.update(of_a_group)
    shapes.update(file.get("frozen_param_shapes") or {})
    return {name: list(shape) for name, shape in shapes.items()}


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


