"""What a run needs to resume exactly: this rank's part of position, rates, masters and state of every block.

The files are DeepSpeed's (one optimizer file per rank at stages 1-3, inside the model file at stage 0); the content is
one layout for every stage, by block and slot. Beside them lies `hift.json`, the manifest: it says what run wrote the
checkpoint, so that one that does not fit is refused before anything is changed. Each save has a mark, which stands in
every file: a save that was cut off while it wrote over an older one leaves files of two saves, and is refused too.
"""

from __future__ import annotations

import copy
import json
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hift_ds.rotation.names import shortest, some
from hift_ds.rotation.rewind import CannotRewind, Rewind
from hift_ds.rotation.rotation import Rotation
from hift_ds.rotation.schedule import CycleScheduler, DelayedRate
from hift_ds.shards import full_shape
from hift_ds.state.unit_state import UnitState

FORMAT = 3
BEFORE_UNITS = 2  # a block's state in one piece: the same where a block is one layer unit
MANIFEST = "hift.json"
MARK = "hift_save"  # its key in the model files
STAGE, RANKS = "zero_optimization.stage", "number of data-parallel ranks"
DTYPES = "fp16 or bf16"
ALWAYS = "hift.always_active, or fresh parameters in its place"
BLOCKS = "hift.layers_per_block, hift.blocks, hift.frozen, hift.always_active and the param groups"


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds of a run; a load changes it in place.

    Attributes:
        blocks: Of each block, its units'.
        always: Of what is always active, or `None`.
        rule: Name of the update rule.
        formats: `hift.state.master` and `hift.state.moments`.
        stage: ZeRO stage.
        world: Ranks of the data-parallel group.
        scheduler: What the engine steps, or `None`.
    """

    blocks: Sequence[Sequence[UnitState]]
    always: UnitState | None
    rule: str
    formats: tuple[str, str]
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
        return [*(state for units in self.blocks for state in units), *(() if self.always is None else (self.always,))]


def new_mark(step: int) -> str:
    """What tells this save from every other; draw it on one rank and give it to all."""
    return f"step {step}, {uuid.uuid4().hex[:12]}"


def write_manifest(run: RunState, mark: str, folder: Path) -> None:
    """Writes `hift.json` into a checkpoint's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "save": mark,
        "lr_scheduler": _name_of(run.scheduler),
        "identity": _identity(run),
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def latest_tag(load_dir: str | Path) -> str | None:
    """The tag in DeepSpeed's file "latest", or `None` without such a file.

    Raises:
        RuntimeError: The file is empty.
    """
    latest = Path(load_dir, "latest")
    if not latest.is_file():
        return None
    tag = latest.read_text(encoding="utf-8").strip()
    if not tag:
        raise RuntimeError(f"checkpoint {str(latest)!r} is empty: a save was cut off; say which tag to load")
    return tag


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; `None` if HiFT has not written it.

    Raises:
        ValueError: No such folder.
        RuntimeError: A manifest that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {str(folder)!r}: no such folder; check load_dir and tag")
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
    except (ValueError, TypeError, KeyError):
        raise RuntimeError(f"checkpoint file {str(path)!r} cannot be read: {_DAMAGED}") from None
    if found not in (FORMAT, BEFORE_UNITS):
        raise RuntimeError(f"the checkpoint has HiFT format {found!r}, this version reads {FORMAT}")
    return content


def check_manifest(run: RunState, folder: Path, whole: bool, schedule: bool) -> dict[str, Any] | None:
    """Reads the manifest and refuses what does not fit this run.

    Args:
        run: This one.
        folder: The checkpoint's, load_dir/tag.
        whole: Position and state are wanted too, not the weights alone.
        schedule: The scheduler's state is wanted too.

    Returns:
        The manifest; `None` if HiFT has not written the checkpoint.

    Raises:
        ValueError: No such folder.
        RuntimeError: Not HiFT's, or of a run with other blocks, order, stage, ranks, dtype, rule or schedule.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        if whole:
            raise RuntimeError(f"checkpoint {str(folder)!r} was not written by HiFT: {_WEIGHTS_ALONE}")
        return None
    if whole and manifest["format"] == BEFORE_UNITS and any(len(units) > 1 for units in run.blocks):
        raise RuntimeError(
            "the checkpoint was written by an earlier hift_ds, which kept a block's state in one piece, and blocks of "
            f"several layers have theirs layer by layer now: {_WEIGHTS_ALONE}"
        )
    _require_same(manifest["identity"], run, whole)
    then, now = manifest["lr_scheduler"], _name_of(run.scheduler)
    if schedule and now is not None and then != now:
        raise RuntimeError(
            f"the checkpoint was written with another lr_scheduler ({then}; this run: {now}): resume with the same, or "
            "begin this one anew with load_checkpoint(..., load_lr_scheduler_states=False)"
        )
    return manifest


def check_files(
    manifest: Mapping[str, Any] | None,
    files: Sequence[Path],
    rank: int,
    parts: Sequence[str],
    module: torch.nn.Module | None,
    strict: bool,
) -> Mapping[str, Any]:
    """Refuses this rank's files of a checkpoint if a load would fail half way. Tensors are not read, only found.

    Args:
        manifest: The checkpoint's, whose save all files must be of; `None` if any will do.
        files: The one of model weights, and this rank's of the optimizer if the load takes anything from it.
        rank: This one's, of those that share a block's state.
        parts: Keys of the first file that DeepSpeed will read.
        module: What takes the weights; `None` if the caller loads them in a way of its own.
        strict: Every name must be in both.

    Returns:
        The first file's content.

    Raises:
        RuntimeError: A file is missing or cut off, is of another save, or has other weights than the model.
    """
    contents = [_opened(path) for path in files]
    states = [content.get("optimizer_state_dict", {}).get("hift", {}) for content in contents[1:]]
    for path, mark in zip(files, [contents[0].get(MARK), *(state.get("save") for state in states)], strict=True):
        if manifest is not None and mark != manifest["save"]:
            raise RuntimeError(
                f"checkpoint file {str(path)!r} is of another save ({mark}) than {MANIFEST} beside it "
                f"({manifest['save']}): a save was cut off while it wrote over an older one; load another tag"
            )
    for path, state in zip(files[1:], states, strict=True):
        if manifest is not None and state.get("rank") != rank:
            raise RuntimeError(
                f"checkpoint file {str(path)!r} is of rank {state.get('rank')}, and rank {rank} would load it: files "
                "were renamed; load another tag"
            )
    for part in parts:
        if contents[0].get(part) is None:
            raise RuntimeError(f"the checkpoint has no {part}, and this run has one: {_WEIGHTS_ALONE}")
    if module is not None:
        _check_module(contents[0], module, strict)
    return contents[0]


def check_schedule(saved: Mapping[str, Any], scheduler: Any, param_groups: list[dict[str, Any]]) -> None:
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
            f"the lr_scheduler ({_name_of(scheduler)}) does not take the checkpoint's state ({error!r}): resume with "
            "the same, or begin this one anew with load_checkpoint(..., load_lr_scheduler_states=False)"
        ) from error
    finally:
        rewind.back()


def optimizer_state(run: RunState, mark: str | None) -> dict[str, Any]:
    """This rank's state, settled: host tensors by reference (no copy is made)."""
    return {
        "hift": {
            "save": mark,
            "rank": run.states[0].shard.rank,
            "identity": _identity(run),
            "step": run.rotation.step,
            "rates": run.rate.rates,
            "units": [_unit_state(state, in_shards=run.stage == 3) for state in run.states],
            "loss_scaler": {k: v for k, v in vars(run.loss_scaler).items() if isinstance(v, (bool, int, float))},
        },
        "param_groups": [
            {key: value for key, value in group.items() if key != "params"} for group in run.param_groups
        ],
        "zero_stage": run.stage,
        "partition_count": run.states[0].shard.world,
    }


def load_optimizer_state(run: RunState, saved: Any, load_optimizer_states: bool) -> None:
    """Restores `optimizer_state`; at stage 3 the model weights too, which are nowhere else. Not collective.

    Below stage 3 DeepSpeed has loaded the model weights before; `check_manifest` and `check_files` have passed.

    Raises:
        RuntimeError: It is of another run; nothing is changed.
    """
    if isinstance(saved, (list, tuple)):
        saved = saved[run.states[0].shard.rank]
    _require_same(saved["hift"]["identity"], run, load_optimizer_states)
    units = saved["hift"]["units"] if "units" in saved["hift"] else saved["hift"]["blocks"]
    if run.stage == 3:
        _load_sharded_weights(run, units)
    if not load_optimizer_states:
        return
    for state, unit in zip(run.states, units, strict=True):
        if state.master is not None and unit["master"] is not None:
            state.master.copy_(unit["master"])
        elif state.master is not None:  # fp32 weights, now updated on the host
            state.refresh_master()
        state.step, state.torn, state.forgotten = unit["step"], False, False
        for name, tensor in state.slots.items():
            tensor.copy_(unit["slots"][name])
        for name, tensor in state.extra.items():
            tensor.copy_(unit["extra"][name])
    run.rotation.step = saved["hift"]["step"]
    run.rate.rates = saved["hift"]["rates"]
    for group, values in zip(run.param_groups, saved["param_groups"], strict=True):
        group.update(values)
    vars(run.loss_scaler).update(saved["hift"]["loss_scaler"])


_WEIGHTS_ALONE = "load its weights alone with load_checkpoint(..., load_module_only=True)"
_DAMAGED = "it was cut off or damaged; load another tag"


def _require_same(saved: Mapping[str, Any], run: RunState, whole: bool) -> None:
    present = _identity(run)
    fits = _weights_fit(saved, present)
    for key, value in present.items():
        before = saved.get(key, value)  # what an older version did not write
        if before != value and (whole or not fits):
            same = "the same"
            if key == ALWAYS:
                same = f'"always_active": {_entries(before, present)}'
            then, now = _values(key, before, value, bool(present[ALWAYS]))
            raise RuntimeError(
                f"the checkpoint was written with another {key} ({then}; this run: {now}): resume with {same}"
                + (f", or {_WEIGHTS_ALONE}" if fits else "")
            )


def _entries(fqns: Sequence[str], present: Mapping[str, Any]) -> str:
    """A value of `hift.always_active` that names parameters."""
    others = [fqn for block in present[BLOCKS] for fqn in block if fqn not in fqns]
    return json.dumps([f"module:{path}" for path in shortest(fqns, others)])


def _values(key: str, before: Any, now: Any, always: bool) -> tuple[str, str]:
    """What differs, short enough for a sentence; with what is always active, which is in the list of blocks."""
    if key == BLOCKS and len(before) != len(now):
        return f"{len(before) - always} blocks", f"{len(now) - always} blocks"
    if key == BLOCKS:
        before, now = next((then, new) for then, new in zip(before, now, strict=True) if then != new)
    if key in (BLOCKS, ALWAYS):
        return some(before) or "none", some(now) or "none"
    then, new = (repr(value) if len(repr(value)) < 60 else "others" for value in (before, now))
    return then, new


def _opened(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RuntimeError(f"checkpoint file {str(path)!r} is missing: the save was cut off; load another tag")
    try:
        # Mapped, so that tensors stay on the disk; with checkpoint_serialization: false they cannot be.
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=False)
    except Exception as error:  # of unpickling, any
        raise RuntimeError(f"checkpoint file {str(path)!r} cannot be read ({error}): {_DAMAGED}") from error


def _check_module(content: Mapping[str, Any], module: torch.nn.Module, strict: bool) -> None:
    """torch copies whatever fits before it says what does not."""
    if any(part._load_state_dict_pre_hooks for part in module.modules()):
        return  # they may give keys other names
    shapes = {name: value.shape for name, value in content["module"].items() if isinstance(value, torch.Tensor)}
    for of_a_block in content.get("param_shapes") or []:  # at stage 3 the module's are placeholders
        shapes.update(of_a_block)
    shapes.update(content.get("frozen_param_shapes") or {})
    present = module.state_dict(keep_vars=True)
    differ = set(content["module"]) ^ set(present)
    if strict and differ:
        raise RuntimeError(
            f"the checkpoint and the model differ in {len(differ)} names, first {min(differ)!r}: load into the same "
            "model, or pass load_module_strict=False"
        )
    for name in sorted(shapes.keys() & present.keys()):
        now = tuple(full_shape(present[name]))
        if shapes[name].numel() and tuple(shapes[name]) != now:
            raise RuntimeError(
                f"the checkpoint has {name!r} of shape {tuple(shapes[name])}, the model of shape {now}: load into the "
                "same model"
            )


def _name_of(scheduler: Any) -> str | None:
    if isinstance(scheduler, CycleScheduler):
        return f"{type(scheduler.scheduler).__name__} with hift.lr_update 'paper'"
    return None if scheduler is None else type(scheduler).__name__


def _unit_state(state: UnitState, in_shards: bool) -> dict[str, Any]:
    content = {"fqns": state.shard.fqns, "step": state.step, "master": state.master, "slots": state.slots}
    content["extra"] = state.extra
    if in_shards and (state.master is None or state.master.dtype != torch.float32):
        # The model file has only placeholders, and the weights do not follow from the masters.
        content["weights"] = state.shard.read_weights(torch.empty(state.shard.numel, dtype=state.shard.dtype))
    return content


@torch.no_grad()
def _load_sharded_weights(run: RunState, units: list[dict[str, Any]]) -> None:
    """By name, not by unit: a load of weights alone may come from a run with other blocks."""
    shards = [state.shard for state in run.states]
    places = {fqn: (shard, index) for shard in shards for index, fqn in enumerate(shard.fqns)}
    for unit in units:
        offset, source = 0, unit["weights"] if "weights" in unit else unit["master"]
        for fqn in unit["fqns"]:
            shard, index = places[fqn]
            segment = shard.segments[index]
            shard.weight_slice(index).copy_(source[offset : offset + segment.numel])
            offset += segment.padded_numel


def _identity(run: RunState) -> dict[str, Any]:
    """What must be the same for a state to fit, as JSON; the key is what a user would look for in the config."""
    groups: list[list[str]] = [[] for _ in run.param_groups]
    for state in run.states:
        for part in state.shard.runs:
            groups[part.group] += [segment.fqn for segment in part.segments]
    always = [] if run.always is None else _fqns([run.always])
    return {
        STAGE: run.stage,
        RANKS: run.world,
        "number of param groups": len(groups),
        ALWAYS: always,
        BLOCKS: [*map(_fqns, run.blocks), *filter(None, [always])],
        "division into param groups": groups,
        "optimizer.type": run.rule,
        "state kept by the update rule, which optimizer.params (momentum) decide": [list(s.slots) for s in run.states],
        "hift.order and hift.seed": list(run.rotation.order),
        "hift.steps_per_block": run.rotation.steps_per_block,
        "hift.state.master and hift.state.moments": list(run.formats),
        DTYPES: sorted({str(param.dtype).removeprefix("torch.") for s in run.states for param in s.shard.params}),
    }


def _fqns(states: Sequence[UnitState]) -> list[str]:
    return [fqn for state in states for fqn in state.shard.fqns]


def _weights_fit(saved: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    """Whether the weights alone can be taken. Those of stage 3 lie in shards, of the parameters that were trained."""
    if 3 not in (saved[STAGE], present[STAGE]):
        return True
    names = [{fqn for block in identity[BLOCKS] for fqn in block} for identity in (saved, present)]
    prefixes = ["bfloat16" in identity[DTYPES] for identity in (saved, present)]  # of the files' names
    same = saved[STAGE] == present[STAGE] and saved[RANKS] == present[RANKS]
    return same and names[0] == names[1] and prefixes[0] == prefixes[1]
