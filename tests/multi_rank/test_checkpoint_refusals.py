"""Checkpoints that do not fit are refused on every rank, before anything is changed."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from hift_testing.contestants import plain_engine
from hift_testing.disturbed import Reentrant
from hift_testing.fingerprints import all_by_block, changed, weights_by_block, weights_by_name
from hift_testing.messages import error_of, logged
from hift_testing.resuming import WARMUP, seeded_engine
from hift_testing.selection import slow
from hift_testing.training import ds_config, engine_of, run_steps, small_llama
from torch.optim.lr_scheduler import LinearLR, SequentialLR

pytestmark = pytest.mark.multi_rank


def edit_manifest(folder: Path, tag: str, **changes: Any) -> None:
    """`identity`: its keys that change."""
    if dist.get_rank() == 0:
        path = folder / tag / "hift.json"
        content = json.loads(path.read_text())
        content["identity"].update(changes.pop("identity", {}))
        content.update(changes)
        path.write_text(json.dumps(content))
    dist.barrier()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def refusals(folder: str) -> None:
    """What each checkpoint that does not fit is refused with; ZeRO-1 in bf16 unless said."""
    root = Path(folder)
    engine = seeded_engine(1, "bf16", {}, seed=0)
    run_steps(engine, 2)
    for tag in ("good", "ranks", "format", "broken"):
        engine.save_checkpoint(root, tag=tag)
    sharded = seeded_engine(3, "bf16", {}, seed=0)
    for tag in ("sharded", "sharded ranks"):
        sharded.save_checkpoint(root, tag=tag, save_latest=False)
    plain = plain_engine(small_llama(1), 1, "bf16")
    plain.save_checkpoint(root, tag="plain", save_latest=False)
    for tag in ("ranks", "sharded ranks"):
        edit_manifest(root, tag, identity={"number of data-parallel ranks": 4})
    edit_manifest(root, "format", format=99)
    if dist.get_rank() == 1:
        truncate(root / "broken" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
        (root / "empty").mkdir()
    dist.barrier()
    alone = "load_module_only=True"

    def loads(tag: str, stage: int = 1, dtype: str = "bf16", hift: Any = None, only: bool = False, **keys: Any) -> str:
        fresh = engine_of(ds_config(stage, dtype, hift or {}, **keys), small_llama(2))
        before = weights_by_block(fresh)
        error = error_of(lambda: fresh.load_checkpoint(root, tag=tag, load_module_only=only))
        # What is refused has changed nothing, and the engine lives.
        assert not changed(before, weights_by_block(fresh)), error
        run_steps(fresh, 1)
        return error

    def other(says: str, tag: str = "good", advice: bool = True, **run: Any) -> None:
        error = loads(tag, **run)
        assert error.startswith("RuntimeError: the checkpoint was written with another")
        assert says in error
        assert (alone in error) == advice, error

    other("zero_optimization.stage (1; this run: 2)", stage=2)
    other("zero_optimization.stage (1; this run: 0)", stage=0)
    other("zero_optimization.stage (1; this run: 3)", stage=3, advice=False)
    other("zero_optimization.stage (3; this run: 2)", "sharded", stage=2, advice=False)
    other("zero_optimization.stage (3; this run: 2)", "sharded", stage=2, only=True, advice=False)
    other("number of data-parallel ranks (4; this run: 2)", "ranks")
    other("number of data-parallel ranks (4; this run: 2)", "sharded ranks", stage=3, only=True, advice=False)
    other("hift.layers_per_block", hift={"layers_per_block": 2})
    other("hift.always_active", hift={"always_active": ["norm"]})
    other("hift.order and hift.seed ([0, 1, 2, 3, 4, 5]; this run: [5, 4, 3, 2, 1, 0])", hift={"order": "top2down"})
    other("hift.steps_per_block (1; this run: 2)", hift={"steps_per_block": 2})
    other("optimizer.type ('adamw'; this run: 'lion')", optimizer={"type": "Lion", "params": {"lr": 1e-3}})
    other("fp16 or bf16 (['bfloat16']; this run: ['float32'])", dtype="fp32")
    sentence = "fp16 or bf16 (['bfloat16']; this run: ['float32'])"
    other(sentence, "sharded", stage=3, dtype="fp32", only=True, advice=False)
    assert loads("format") == "RuntimeError: the checkpoint has HiFT format 99, this version reads 3"
    error = loads("plain")
    assert "was not written by HiFT" in error and alone in error
    error = loads("nowhere")
    assert error.startswith("ValueError: checkpoint") and "no such folder" in error
    error = loads("broken")  # on rank 1
    assert error.startswith("RuntimeError: rank 1 failed:" if dist.get_rank() == 0 else "RuntimeError: ")
    error = loads(("good", "ranks")[dist.get_rank()])
    assert error == "RuntimeError: checkpoint tag: ranks 0 and 1 differ; every rank must be given the same"
    fresh = engine_of(ds_config(1, "bf16", {}), small_llama(2))
    before = weights_by_block(fresh)
    assert fresh.load_checkpoint(root / "empty") == (None, None)  # as DeepSpeed, which warns
    assert not changed(before, weights_by_block(fresh))
    fresh.load_checkpoint(root, tag="plain", load_module_only=True)
    assert weights_by_name(plain) == weights_by_name(fresh)


@pytest.mark.gathers
def test_checkpoints_that_do_not_fit_are_refused_on_every_rank(two_ranks, tmp_path):
    two_ranks.run(refusals, str(tmp_path))


def everything(engine: Any) -> dict[str, str]:
    """A fingerprint of each thing that a load changes."""
    groups = [{k: value for k, value in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    counters = (engine.global_steps, engine.global_samples, engine.skipped_steps, engine.hift.active_block)
    schedule = None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict()
    facts = {"groups": groups, "counters": counters, "rates": engine.optimizer.rates, "schedule": schedule}
    facts["scale"] = vars(engine.optimizer.loss_scaler)
    return {**weights_by_name(engine), **all_by_block(engine), **{name: repr(value) for name, value in facts.items()}}


def refusal(engine: Any, folder: Path, **load: Any) -> str:
    """The error of a load, which has changed nothing."""
    before = everything(engine)
    error = error_of(lambda: engine.load_checkpoint(folder, **load))
    assert not changed(before, everything(engine)), error
    return error.replace(str(folder), "")


def grouped(model: torch.nn.Module, decayed: str, split: bool = True) -> dict[str, Any]:
    """`model_parameters` with the weights that match in a group of their own."""
    inside = [param for name, param in model.named_parameters() if re.search(decayed, name)]
    outside = [param for name, param in model.named_parameters() if not re.search(decayed, name)]
    groups = [{"params": inside, "weight_decay": 0.1}, {"params": outside, "weight_decay": 0.0}]
    return {"model_parameters": groups if split else [*inside, *outside]}


def phases(count: int) -> Callable[[torch.optim.Optimizer], SequentialLR]:
    """A schedule in several phases of two steps each."""
    return lambda holder: SequentialLR(holder, [LinearLR(holder) for _ in range(count)], list(range(2, 2 * count, 2)))


def sgd(momentum: float) -> dict[str, Any]:
    return {"optimizer": {"type": "SGD", "params": {"lr": 1e-2, "momentum": momentum}}}


def larger(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = small_llama(seed)
    model.lm_head = torch.nn.Linear(40, 100, bias=False)
    model.config.vocab_size = 100
    return model


def with_buffer(seed: int) -> torch.nn.Module:
    model = small_llama(seed)
    model.register_buffer("extra", torch.ones(3))
    return model


def a_run(model: Any = small_llama, arguments: Any = lambda model: {}, hift: Any = None, **keys: Any) -> Any:
    """Model by its seed, further arguments of `initialize`, hift section, keys of the config."""
    return model, arguments, hift or {}, keys


SCHEDULED = a_run(scheduler=WARMUP)
SHAPES = "'lm_head.weight' of shape (96, 40), the model of shape (100, 40)"
# name -> stage, the run that saves, the other, and what the refusal says
MISFITS: dict[str, Any] = {
    "another number of groups": (
        0, a_run(), a_run(arguments=lambda m: grouped(m, "proj")), "another number of param groups (1; this run: 2)",
    ),
    "other groups": (
        3, a_run(arguments=lambda m: grouped(m, "proj")), a_run(arguments=lambda m: grouped(m, "norm")),
        "another hift.layers_per_block, hift.blocks, hift.frozen, hift.always_active and the param groups",
    ),
    "momentum on": (1, a_run(**sgd(0.0)), a_run(**sgd(0.9)), "optimizer.params (momentum) decide"),
    "momentum off": (2, a_run(**sgd(0.9)), a_run(**sgd(0.0)), "optimizer.params (momentum) decide"),
    "other blocks": (2, a_run(), a_run(hift={"layers_per_block": 2}), "param groups (6 blocks; this run: 3 blocks)"),
    "another shape": (3, a_run(), a_run(larger), SHAPES),
    "another shape below stage 3": (1, a_run(), a_run(larger), SHAPES),
    "another name": (0, a_run(), a_run(with_buffer), "differ in 1 names, first 'extra'"),
    "no schedule": (0, a_run(), SCHEDULED, "another lr_scheduler (None; this run: WarmupDecayLR)"),
    "another schedule": (
        2, SCHEDULED, a_run(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 4}}),
        "another lr_scheduler (WarmupDecayLR; this run: WarmupLR)",
    ),
    "another schedule of the same class": (
        1, a_run(arguments=lambda model: {"lr_scheduler": phases(3)}),
        a_run(arguments=lambda model: {"lr_scheduler": phases(2)}),
        "the lr_scheduler (SequentialLR) does not take the checkpoint's state (Index",
    ),
    "a schedule by cycles": (
        1, SCHEDULED, a_run(hift={"lr_update": "paper"}, scheduler=WARMUP),
        "another lr_scheduler (WarmupDecayLR; this run: WarmupDecayLR with hift.lr_update 'paper')",
    ),
}  # fmt: skip


def misfits(folder: str, name: str) -> None:
    """The refusal of a checkpoint of a run that differs in one thing."""
    stage, *runs, says = MISFITS[name]
    engines = []
    for seed, (model_of, arguments, hift, keys) in enumerate(runs):
        model = model_of(seed)
        engines.append(engine_of(ds_config(stage, "bf16", hift, **copy.deepcopy(keys)), model, **arguments(model)))
        run_steps(engines[-1], 2 + seed)
    engines[0].save_checkpoint(folder)
    error = refusal(engines[1], Path(folder))
    assert error.startswith("RuntimeError: the ")
    assert says in error
    run_steps(engines[1], 1, start=3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.gathers if run[0] == 3 else ()) for name, run in MISFITS.items()]
)
def test_a_run_that_differs_in_one_thing_is_refused_before_anything_is_changed(two_ranks, tmp_path, name):
    two_ranks.run(misfits, str(tmp_path), name)


def mixed(root: Path, tag: str, wanted: str, base: str = "new", other: str = "old") -> None:
    """A tag with the files of `base` but those that match `wanted`, which are `other`'s, as after a cut."""
    shutil.copytree(root / base, root / tag)
    for path in (root / other).glob(wanted):
        shutil.copy(path, root / tag / path.name)


def damaged(folder: str, stage: int) -> None:
    """Loads of checkpoints with files that are missing, cut off or of another save; then of a good one."""
    root = Path(folder)
    engine = seeded_engine(stage, "bf16", {}, seed=0, scheduler=True)
    for tag in ("old", "new"):
        run_steps(engine, 2)
        engine.save_checkpoint(root, tag=tag)
    weights = "zero_pp_rank_1_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    state = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt" if stage else weights  # at stage 0 one file has both
    if dist.get_rank() == 0:
        mixed(root, "older state", state)
        mixed(root, "older weights", weights)
        mixed(root, "newer manifest", "hift.json", base="old", other="new")
        for name in dict.fromkeys((state, weights, "hift.json")):
            for kind, damage in (("no", Path.unlink), ("cut", truncate)):
                shutil.copytree(root / "new", root / f"{kind} {name}")
                damage(root / f"{kind} {name}" / name)
        (root / "latest").write_text("")
        if stage:  # another engine has saved over the tag, and was cut off
            shutil.copytree(root / "new", root / "foreign state")
            torch.save({"optimizer_state_dict": {"zero_stage": stage}}, root / "foreign state" / state)
            shutil.copytree(root / "new", root / "swapped state")
            first, second = sorted((root / "swapped state").glob("*optim_states.pt"))
            first.rename(root / "aside")
            second.rename(first)
            (root / "aside").rename(second)
    dist.barrier()
    fresh = seeded_engine(stage, "bf16", {}, seed=1, scheduler=True)
    run_steps(fresh, 3)

    def refused(tag: str, *says: str) -> None:
        error = refusal(fresh, root, tag=tag)
        assert all(part in error for part in says), (tag, error)

    refused("older state", state, "is of another save")
    refused("older weights", weights, "is of another save")
    refused("newer manifest", "_states.pt", "is of another save")
    for name in (state, weights):
        refused(f"no {name}", name, "is missing")
        refused(f"cut {name}", name, "cannot be read")
    refused("no hift.json", "not written by HiFT")
    refused("cut hift.json", "hift.json' cannot be read: it was cut off")
    if stage:
        refused("foreign state", state, "is of another save (None)")
        error = refusal(fresh, root, tag="swapped state")
        assert re.search("is of rank (0, and rank 1|1, and rank 0) would load it: files were renamed", error)
    assert "empty: a save was cut off" in refusal(fresh, root)
    # At stages 0 to 2 one file has all weights, so they are whole, of whichever save.
    error = error_of(lambda: fresh.load_checkpoint(root, tag="older weights", load_module_only=True))
    assert (weights in error and "another save" in error) if stage == 3 else error == ""
    _, client_state = fresh.load_checkpoint(root, tag="new")
    assert changed(everything(engine), everything(fresh)) == []
    assert "hift_save" not in client_state
    assert not list(root.glob("*.py"))


@pytest.mark.parametrize("stage", [0, slow(2), 3])
def test_files_that_are_missing_cut_off_or_of_another_save_are_refused_before_anything_is_changed(
    two_ranks, tmp_path, stage
):
    two_ranks.run(damaged, str(tmp_path), stage)


def after_a_step_that_failed(folder: str, stage: int) -> None:
    """Save and load when the last step, which the host has not waited for, had no gradient."""
    root, hift = Path(folder), {"layers_per_block": 1, "kernel": "triton"}
    engine = engine_of(ds_config(stage, "fp32", hift), Reentrant(head=False))
    engine.save_checkpoint(root, tag="start")
    manifest = (root / "start" / "hift.json").read_text()

    def step() -> None:
        engine.backward(engine(torch.ones(2, 6)))
        engine.step()

    step()
    assert "received no gradient on any rank" in error_of(lambda: engine.save_checkpoint(root, tag="start"))
    assert (root / "start" / "hift.json").read_text() == manifest
    fresh = everything(engine_of(ds_config(stage, "fp32", hift), Reentrant(head=False)))
    step()
    with logged("hift_ds.zero") as warnings:
        engine.load_checkpoint(root, tag="start")
    assert changed(fresh, everything(engine)) == []
    (warning,) = warnings
    assert "the last step before load_checkpoint()" in warning


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_that_failed_unheard_is_said_before_a_save_and_does_not_break_a_load(two_ranks, tmp_path, stage):
    two_ranks.run(after_a_step_that_failed, str(tmp_path), stage)


def foreign_state(stage: int) -> None:
    """`optimizer.load_state_dict` by itself, with what an optimizer of other blocks has given."""
    other = seeded_engine(stage, "bf16", {"layers_per_block": 2}, seed=0)
    engine = seeded_engine(stage, "bf16", {}, seed=1)
    state = other.optimizer.state_dict()
    before = everything(engine)
    # as DeepSpeed gives it: all ranks' at stages 1 to 3
    error = error_of(lambda: engine.optimizer.load_state_dict([state] * dist.get_world_size() if stage else state))
    assert error.startswith("RuntimeError: the checkpoint was written with another hift.layers_per_block")
    assert not changed(before, everything(engine))


@pytest.mark.parametrize("stage", [0, 1])
def test_the_optimizers_state_of_other_blocks_is_refused_before_anything_is_changed(two_ranks, stage):
    two_ranks.run(foreign_state, stage)


def other_form(folder: str) -> None:
    """A checkpoint of split masters and a run with fp32 state."""
    first = seeded_engine(2, "bf16", {"kernel": "triton", "state": {"master": "split16"}}, seed=0)
    run_steps(first, 1)
    first.save_checkpoint(folder)
    error = error_of(lambda: seeded_engine(2, "bf16", {}, seed=1).load_checkpoint(folder))
    assert "another hift.state.master and hift.state.moments (['split16', 'fp32']; this run: ['fp32'" in error


def test_a_checkpoint_of_another_form_of_state_is_refused(two_ranks, tmp_path):
    two_ranks.run(other_form, str(tmp_path))
