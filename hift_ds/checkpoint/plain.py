"""Plain DeepSpeed's checkpoints, of any ranks and stage, and its universal ones, as `Saved` reads them.

Where masters and moments lie (DeepSpeed 0.18.5 to 0.19.8):

    stage 0     in the model file, by the place of a parameter in its group; without names
    stage 1, 2  of each rank a part of each group's flat vector, in the order of `param_shapes`
    stage 3     of each rank its slices of ceil(numel / ranks) elements, in the order of `param_shapes`
    universal   a folder for each parameter
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from hift_ds.checkpoint.content import RunState, scale_of, schedule_name, slots_of
from hift_ds.checkpoint.manifest import DAMAGED, MANIFEST
from hift_ds.checkpoint.pickled import opened, shapes_of_file
from hift_ds.checkpoint.saved import Saved
from hift_ds.checkpoint.tensor_files import CODES
from hift_ds.rotation.schedule import CycleScheduler
from hift_ds.shards import full_shape, slice_numel

_MODEL = "*mp_rank_00_model_states.pt"
_OPTIMIZER = "*zero_pp_rank_*_mp_rank_00_optim_states.pt"
_FORMS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
Tensors = Mapping[str, torch.Tensor]


class Pieces:
    """Tensors of which each lies in several pieces, one after another (`saved.Tensors`)."""

    metadata: Mapping[str, str] = {}

    def __init__(self) -> None:
        self._found: dict[str, list[torch.Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def add(self, name: str, piece: torch.Tensor) -> None:
        """The next piece."""
        self._found.setdefault(name, []).append(piece.detach().reshape(-1))

    def numel(self, name: str) -> int:
        """Of all pieces."""
        return sum(piece.numel() for piece in self._found[name])

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor."""
        return self._found[name][0].dtype

    def code(self, name: str) -> str:
        """As Tensors.code."""
        return CODES[self.dtype(name)]

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """As Tensors.read."""
        stop = self.numel(name) if last is None else last
        parts, begin = [], 0
        for piece in self._found[name]:
            inside = piece[max(first - begin, 0) : max(stop - begin, 0)]
            begin += piece.numel()
            if inside.numel():
                parts.append(inside)
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else self._found[name][0][:0]


class Collected:
    """What has been found: pieces named as in our own files, and of each parameter its group and number of updates."""

    def __init__(self) -> None:
        self.pieces = Pieces()
        self.group: dict[str, int] = {}
        self.step: dict[str, int] = {}
        self.slots: dict[str, set[str]] = {}
        self.param_groups: list[dict[str, Any]] = []
        self.scale: dict[str, Any] = {}
        self.filled: dict[int, int] = {}  # elements of each group's flat vector

    def add(self, fqn: str, group: int, master: torch.Tensor, state: Mapping[str, Any], span: slice) -> None:
        """The next piece of a parameter and of its moments: elements `span` of tensors that are as long, or padded."""
        numel = master.numel()
        self.group[fqn] = group
        self.pieces.add(fqn, master.detach().reshape(-1)[span])
        self.step[fqn] = int(state.get("step", self._of_group(group).get("step", 0)))
        moments = {slot: value for slot, value in state.items() if slot != "step" and torch.is_tensor(value)}
        self.slots[fqn] = set(moments)
        for slot, value in moments.items():
            if value.numel() >= numel:  # DeepSpeed takes the padding off the masters alone
                self.pieces.add(f"{fqn}::{slot}", value.reshape(-1)[span])

    def add_flat(
        self, group: int, names: Iterable[str], numels: Iterable[int], master: torch.Tensor, state: Mapping[str, Any]
    ) -> None:
        """Whole parameters, or a rank's slices, one after another."""
        start = 0
        for fqn, numel in zip(names, numels, strict=True):
            self.add(fqn, group, master, state, slice(start, start + numel))
            start += numel

    def _of_group(self, group: int) -> Mapping[str, Any]:
        return self.param_groups[group] if group < len(self.param_groups) else {}


def read(place: Path, run: RunState, module: torch.nn.Module, states: bool) -> Saved:
    """A checkpoint that HiFT has not written. Tensors stay on the disk until they are read.

    Args:
        place: Its folder.
        run: Takes it.
        module: Its model.
        states: Masters and moments are wanted, too.

    Raises:
        RuntimeError: A file is missing or cannot be read, or it has no masters and they are wanted.
    """
    model_files = sorted(place.glob(_MODEL), key=_rank)
    if not model_files:
        raise RuntimeError(f"checkpoint {str(place)!r} has no *_model_states.pt: it was cut off, or is none; see tag")
    if any(place.glob("*mp_rank_01_*")):
        raise RuntimeError(f"checkpoint {str(place)!r} is of model parallel ranks, which HiFT has not")
    model = opened(model_files[0])
    shapes = shapes_of_file(model)
    sharded = model_files[0].name.startswith("zero_pp_rank_")
    if isinstance(model["dp_world_size"], str) and (states or sharded):  # as `save_checkpoint` marks it
        raise RuntimeError(f"checkpoint file {str(place / MANIFEST)!r} is missing: {DAMAGED}")
    found = Collected()
    stage = _collect(found, place, model, run, module, sharded) if states or sharded else 0
    if states and not found.group:
        raise RuntimeError(
            f"checkpoint {str(place)!r} has no optimizer state: load its weights alone with load_checkpoint(..., "
            "load_module_only=True)"
        )
    wanted = {fqn: slots_of(state) for state in run.states for fqn in state.shard.fqns}
    updates = max(1, model["global_steps"] - model["skipped_steps"])  # where an optimizer does not count its own
    masters = {
        fqn: _described(found, fqn, shapes[fqn], model["module"], wanted.get(fqn, []), updates) for fqn in found.group
    }
    untrained = _untrained(found.pieces, model_files if sharded else [], model, masters)
    _require_whole(found, place, {name: math.prod(shapes[name]) for name in (*masters, *untrained)})
    schedule = run.scheduler if model.get("lr_scheduler") is not None else None
    facts = {
        "plain": True, "format": None, "zero_stage": stage, "ranks": _ranks(model), "state_ranks": 1, "rule": None,
        "module": shapes, "parameters": masters, "frozen": untrained, "buffers": [], "tied": {},
        "rotation": {"order": [0], "steps_per_block": 1, "blocks": []}, "step": 0, "rates": None,
        "param_groups": _groups_here(found.param_groups, run), "loss_scaler": _scale_here(found.scale, run),
        "lr_scheduler": "of plain DeepSpeed" if isinstance(schedule, CycleScheduler) else schedule_name(schedule),
    }  # fmt: skip
    return Saved(facts, lambda rank, part: found.pieces)


def _collect(
    found: Collected, place: Path, model: Mapping[str, Any], run: RunState, module: torch.nn.Module, sharded: bool
) -> int:
    """Masters and moments; the ZeRO stage."""
    if (place / "zero").is_dir():
        _of_universal(found, place, model)
        return 3 if sharded else 1
    files = sorted(place.glob(_OPTIMIZER), key=_rank)
    if not files and model.get("optimizer"):
        _of_stage_0(found, model, run, module)
        return 0
    if files and [_rank(file) for file in files] != list(range(_ranks(model))):
        raise RuntimeError(
            f"checkpoint {str(place)!r} is of {_ranks(model)} ranks and has {len(files)} files of optimizer state "
            "(*_optim_states.pt): some are missing; load another tag"
        )
    for file in files:
        (_of_stage_3 if sharded else _of_stage_1)(found, opened(file)["optimizer_state_dict"], model)
    return 3 if sharded else 1


def _of_stage_0(found: Collected, model: Mapping[str, Any], run: RunState, module: torch.nn.Module) -> None:
    optimizer = model["optimizer"]
    base = optimizer.get("optimizer_state_dict", optimizer)  # inside DeepSpeed's own for 16 bits
    found.param_groups, found.scale = base["param_groups"], _scale(optimizer)
    masters, flat = optimizer.get("fp32_groups"), optimizer.get("fp32_groups_flat")
    for group, names in enumerate(_names_in_groups(base["param_groups"], flat, run, module)):
        if flat is not None:
            numels = [math.prod(model["module"][fqn].shape) for fqn in names]
            found.add_flat(group, names, numels, flat[group], _at(base["state"], group))
            continue
        for place, (fqn, index) in enumerate(zip(names, base["param_groups"][group]["params"], strict=True)):
            state = _at(base["state"], index)
            weight = model["module"].get(fqn) if masters is None else masters[group][place]
            if weight is not None:
                _require_same_shape(fqn, weight, state)
                found.add(fqn, group, weight, state, slice(None))


def _require_same_shape(fqn: str, weight: torch.Tensor, state: Mapping[str, Any]) -> None:
    for slot, value in state.items():
        if torch.is_tensor(value) and value.ndim == weight.ndim and value.numel() > 1 and value.shape != weight.shape:
            raise RuntimeError(
                f"the checkpoint's optimizer state has no names (ZeRO stage 0), and {slot} in the place of {fqn!r} has "
                f"shape {tuple(value.shape)}, not {tuple(weight.shape)}: give the optimizer the same parameters in the "
                "same order"
            )


def _names_in_groups(
    then: Sequence[Mapping[str, Any]], flat: Any, run: RunState, module: torch.nn.Module
) -> list[list[str]]:
    """Of a checkpoint that has none: those of this run in the same places."""
    names = {param: name for name, param in module.named_parameters()}
    now = [[names[param] for param in group["params"] if param in names] for group in run.param_groups]
    trained = {fqn for state in run.states for fqn in state.shard.fqns}
    shapes = {name: full_shape(param) for name, param in module.named_parameters()}
    found = []
    for number, group in enumerate(then):
        here = now[number] if number < len(now) else []
        only = [fqn for fqn in here if fqn in trained]
        fitting = [
            fqns for fqns in (here, only)
            if (flat is not None and sum(shapes[fqn].numel() for fqn in fqns) == flat[number].numel())
            or (flat is None and len(fqns) == len(group["params"]))
        ]  # fmt: skip
        if not fitting or len(then) != len(now):
            raise RuntimeError(
                f"the checkpoint's optimizer state has no names (ZeRO stage 0), and its {len(then)} param groups are "
                f"not this run's {len(now)}, with as many parameters in each: give the optimizer the same groups"
            )
        found.append(fitting[0])
    return found


def _of_stage_1(found: Collected, part: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """A rank's part of ZeRO-1 or 2; ranks in their order."""
    base = part["base_optimizer_state"]
    states = base if isinstance(base, list) else base["state"]  # "elastic_checkpoint" keeps no param groups
    found.param_groups = [{} for _ in base] if isinstance(base, list) else base["param_groups"]
    found.scale = _scale(part)
    paddings = part.get("param_alignment_paddings")  # after each parameter
    # Not by `param_slice_mappings`, which name others with round_robin_gradients (DeepSpeed 0.19.8).
    for group, shapes in enumerate(model["param_shapes"]):
        master, offset = part["single_partition_of_fp32_groups"][group], -found.filled.get(group, 0)
        after = paddings[group] if paddings else repeat(0, len(shapes))
        for (fqn, shape), padding in zip(shapes.items(), after, strict=True):
            stop = offset + math.prod(shape)
            if max(offset, 0) < min(stop, master.numel()):
                found.add(fqn, group, master, _at(states, group), slice(max(offset, 0), min(stop, master.numel())))
            offset = stop + padding
        found.filled[group] = found.filled.get(group, 0) + master.numel()


def _of_stage_3(found: Collected, part: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """A rank's slices; ranks in their order."""
    base, ranks = part["optimizer_state_dict"], _ranks(model)
    found.param_groups, found.scale = base["param_groups"], _scale(part)
    group_of = _group_of(base["param_groups"])
    for index, shapes in enumerate(model["param_shapes"]):
        master, state = part["fp32_flat_groups"][index], _at(base["state"], index)
        start = 0
        for fqn, shape in shapes.items():
            numel, before = math.prod(shape), found.pieces.numel(fqn) if fqn in found.pieces else 0
            each = slice_numel(numel, ranks)
            found.add(fqn, group_of[index], master, state, slice(start, start + min(each, numel - before)))
            start += each


def _of_universal(found: Collected, place: Path, model: Mapping[str, Any]) -> None:
    path = place / "zero" / "optimizer_state.pt"
    common = opened(path)
    base = common.get("optimizer_state_dict", common)
    found.param_groups, found.scale = base["param_groups"], _scale(common)
    group_of = _group_of(base["param_groups"])
    indices = {fqn: index for index, shapes in enumerate(model["param_shapes"]) for fqn in shapes}
    for fqn, index in indices.items():
        inside = {path.stem: opened(path) for path in (place / "zero" / fqn).glob("*.pt")}
        values = {name: value["param"] if isinstance(value, dict) else value for name, value in inside.items()}
        if "fp32" not in values:
            raise RuntimeError(f"checkpoint file {str(place / 'zero' / fqn / 'fp32.pt')!r} is missing: convert it anew")
        state = {**base.get("state", {}).get(index, {}), **values}
        step = {"step": state["step"]} if "step" in state else {}
        slots = {name: value for name, value in values.items() if name not in ("fp32", "step")}
        found.add(fqn, group_of[index], values["fp32"], {**slots, **step}, slice(None))


def _at(states: Any, index: int) -> Mapping[str, Any]:
    """Of a flat vector or a parameter: nothing where no update was made."""
    return states[index] if isinstance(states, list) else states.get(index, {})


def _group_of(param_groups: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Param group of each flat vector."""
    return {index: number for number, group in enumerate(param_groups) for index in group["params"]}


def _described(
    found: Collected, fqn: str, shape: list[int], module: Tensors, wanted: Sequence[str], updates: int
) -> dict[str, Any]:
    """As the manifest describes it; moments count where they are those that this run's rule keeps."""
    pieces, numel = found.pieces, math.prod(shape)
    has = {slot for slot in found.slots[fqn] if f"{fqn}::{slot}" in pieces and pieces.numel(f"{fqn}::{slot}") == numel}
    slots = list(wanted) if has == set(wanted) == found.slots[fqn] else []
    master = pieces.dtype(fqn)
    return {
        "shape": shape, "dtype": CODES[module[fqn].dtype] if fqn in module else CODES[master], "slice": numel,
        "group": found.group[fqn], "master": "fp32" if master == torch.float32 else "none", "slots": slots,
        "moments": _FORMS.get(pieces.dtype(f"{fqn}::{slots[0]}"), "none") if slots else "none",
        "step": (found.step[fqn] or updates) if slots or not wanted else 0, "file": "", "unit": 0,
    }  # fmt: skip


def _untrained(
    pieces: Pieces, sharded: Sequence[Path], model: Mapping[str, Any], masters: Mapping[str, Any]
) -> dict[str, int]:
    """Adds the weights that no master is of; their numels."""
    found = {}
    if sharded:
        for file in sharded:
            for fqn, piece in (opened(file).get("frozen_param_fragments") or {}).items():
                pieces.add(fqn, piece)
        shapes = model.get("frozen_param_shapes") or {}
        found = {fqn: math.prod(shape) for fqn, shape in shapes.items()}
    else:
        for fqn, weight in model["module"].items():
            if torch.is_tensor(weight) and fqn not in masters:
                pieces.add(fqn, weight)
                found[fqn] = weight.numel()
    return found


def _require_whole(found: Collected, place: Path, numels: Mapping[str, int]) -> None:
    for fqn, numel in numels.items():
        has = found.pieces.numel(fqn) if fqn in found.pieces else 0
        if has < numel or (has > numel and fqn in found.group):  # the last slice of a frozen one is padded
            raise RuntimeError(
                f"checkpoint {str(place)!r} has {has:,} of the {numel:,} elements of {fqn!r}: files of another run or "
                "of expert or model parallel ranks lie in it"
            )


def _scale(of: Mapping[str, Any]) -> dict[str, Any]:
    """The loss scaler's attributes: an object's, or at stage 0 entries."""
    scaler = of.get("loss_scaler")
    return vars(scaler) if scaler is not None else {k: v for k, v in of.items() if isinstance(v, (bool, int, float))}


def _scale_here(scale: Mapping[str, Any], run: RunState) -> dict[str, Any]:
    """As this run's scaler has it, which keeps its own beside one of another kind."""
    mine = scale_of(run)
    alike = scale.get("dynamic", scale.get("dynamic_loss_scale")) == mine.get("dynamic")
    return {**mine, **{key: value for key, value in scale.items() if alike and key in mine}}


def _groups_here(param_groups: Sequence[Mapping[str, Any]], run: RunState) -> list[dict[str, Any]]:
    """What this run's groups have, too."""
    found = []
    for number, group in enumerate(param_groups):
        here = run.param_groups[number] if number < len(run.param_groups) else {}
        # What is true or false makes another rule of it, which this run has chosen.
        taken = (key for key in group if key in here and key != "params" and not isinstance(group[key], bool))
        found.append({key: group[key] for key in taken})
    return found


def _ranks(model: Mapping[str, Any]) -> int:
    return int(str(model["dp_world_size"]).split()[0])


def _rank(path: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else 0
