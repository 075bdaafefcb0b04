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
from deepspeed.utils import safe_get_full_optimizer_state
from hift_testing.contestants import plain_engine
from hift_testing.disturbed import Reentrant
from hift_testing.fingerprints import all_by_block, changed, weights_by_block, weights_by_name
from hift_testing.messages import error_of, logged
from hift_testing.resuming import WARMUP, seeded_engine
from hift_testing.selection import slow
from hift_testing.training import ds_config, engine_of, run_steps, small_llama
from torch.optim.lr_scheduler import LinearLR, SequentialLR

from hift_ds.distributed import of_all_ranks

pytestmark = pytest.mark.multi_rank


def edit_manifest(folder: Path, tag: str, **changes: Any) -> None:
    if dist.get_rank() == 0:
        path = folder / tag / "hift.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, **changes}))
    dist.barrier()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def refusals(folder: str) -> None:
    """What each checkpoint that does not fit is refused with; ZeRO-1 in bf16 unless said."""
    root = Path(folder)
    engine = seeded_engine(1, "bf16", {}, seed=0)
    run_steps(engine, 2)
    for tag in ("good", "format", "earlier", "broken"):
        engine.save_checkpoint(root, tag=tag)
    plain = plain_engine(small_llama(1), 1, "bf16")
    plain.save_checkpoint(root, tag="plain", save_latest=False)
    edit_manifest(root, "format", format=99)
    edit_manifest(root, "earlier", format=3, identity={"zero_optimization.stage": 3})
    if dist.get_rank() == 1:
        truncate(root / "broken" / "hift_rank_1_block_2.safetensors")
        (root / "empty").mkdir()
    dist.barrier()
    alone = "load_module_only=True"

    def loads(tag: str, stage: int = 1, only: bool = False, **keys: Any) -> str:
        fresh = engine_of(ds_config(stage, "bf16", {}, **keys), small_llama(2))
        before = weights_by_block(fresh)
        error = error_of(lambda: fresh.load_checkpoint(root, tag=tag, load_module_only=only))
        # What is refused has changed nothing, and the engine lives.
        assert not changed(before, weights_by_block(fresh)), error
        run_steps(fresh, 1)
        return error

    error = loads("good", optimizer={"type": "Lion", "params": {"lr": 1e-3}})
    assert "another optimizer.type ('adamw'; this run: 'lion')" in error and alone in error
    error = loads("format")
    assert error == f"RuntimeError: the checkpoint has HiFT format 99, this version reads 4, and {SHARDED}"
    assert SHARDED in loads("earlier", only=True)
    error = loads("nowhere")
    assert error.startswith("ValueError: checkpoint") and "no such folder" in error
    error = loads("broken")
    assert error.startswith(("RuntimeError: rank", "RuntimeError: checkpoint file")), error
    assert "hift_rank_1_block_2.safetensors' has 1,000 bytes and was written with" in error
    error = loads(("good", "format")[dist.get_rank()])
    assert error == "RuntimeError: checkpoint tag: ranks 0 and 1 differ; every rank must be given the same"
    fresh = engine_of(ds_config(1, "bf16", {}), small_llama(2))
    before = weights_by_block(fresh)
    assert fresh.load_checkpoint(root / "empty") == (None, None)  # as DeepSpeed, which warns
    assert not changed(before, weights_by_block(fresh))
    fresh.load_checkpoint(root, tag="plain", load_module_only=True)
    assert weights_by_name(plain) == weights_by_name(fresh)


SHARDED = "at stage 3 its weights lie in shards: resume with the version that wrote it"


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
        "another division into param groups: ",
    ),
    "momentum on": (1, a_run(**sgd(0.0)), a_run(**sgd(0.9)), "optimizer.params (momentum) decide"),
    "momentum off": (2, a_run(**sgd(0.9)), a_run(**sgd(0.0)), "optimizer.params (momentum) decide"),
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


def same_file(root: Path, tag: str, name: str) -> bool:
    return (root / tag / name).read_bytes() == (root / "new" / name).read_bytes()


def damaged(folder: str, stage: int) -> None:
    """Loads of checkpoints with files that are missing, cut off, not as written or of another save; then of a good one.

    Each kind of file and each kind of damage.
    """
    root = Path(folder)
    engine = seeded_engine(stage, "bf16", {"frozen": ["embed_tokens"]}, seed=0, scheduler=True)
    for tag in ("old", "new"):
        run_steps(engine, 2)
        engine.save_checkpoint(root, tag=tag, client_state={"mine": tag})
    weights = "zero_pp_rank_1_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    rank = 1 if stage else 0
    names = (f"hift_rank_{rank}_block_1.safetensors", "hift_rank_1.safetensors", weights, "hift.json")
    kinds = {"no": Path.unlink, "cut": truncate, "flipped": flip, "empty": lambda path: path.write_bytes(b""),
             "older": lambda path: shutil.copy(root / "old" / path.name, path)}  # fmt: skip
    if dist.get_rank() == 0:
        for name in names:
            for kind, damage in kinds.items():
                shutil.copytree(root / "new", root / f"{kind} {name}")
                damage(root / f"{kind} {name}" / name)
        (root / "latest").write_text("")
        shutil.copytree(root / "new", root / "swapped")
        first, second = (root / "swapped" / f"hift_rank_{rank}_block_{block}.safetensors" for block in (1, 2))
        first.rename(root / "aside")
        second.rename(first)
        (root / "aside").rename(second)
    dist.barrier()
    fresh = seeded_engine(stage, "bf16", {"frozen": ["embed_tokens"]}, seed=1, scheduler=True)
    run_steps(fresh, 3)
    for name in names[:-1]:
        for kind, says in (("no", "is missing"), ("cut", "has 1,000 bytes and was written with"), ("older", name),
                           ("flipped", "is not as it was written (sha256)"), ("empty", "has 0 bytes")):  # fmt: skip
            if (root / f"{kind} {name}" / name).is_file() and same_file(root, f"{kind} {name}", name):
                continue  # nothing was drawn between the two saves
            error = refusal(fresh, root, tag=f"{kind} {name}")
            assert says in error and name in error, (kind, name, error)
    assert "hift.json' is missing: it was cut off or damaged" in refusal(fresh, root, tag="no hift.json")
    assert re.search("another save|is not as it was written|bytes and was", refusal(fresh, root, tag="older hift.json"))
    for kind in ("cut", "flipped", "empty"):
        assert re.search("hift.json' (cannot be read|is not as)", refusal(fresh, root, tag=f"{kind} hift.json"))
    assert re.search(r"block_\d.safetensors' (is not as it|has)", refusal(fresh, root, tag="swapped"))
    assert "empty: a save was cut off" in refusal(fresh, root)
    _, client_state = fresh.load_checkpoint(root, tag="new")
    assert changed(everything(engine), everything(fresh)) == []
    assert client_state["mine"] == "new"
    assert not list(root.glob("*.py")) and not list(root.glob("*.unfinished"))


@pytest.mark.parametrize("stage", [0, slow(2), 3])
def test_files_that_are_missing_or_not_as_they_were_written_are_refused_before_anything_is_changed(
    two_ranks, tmp_path, stage
):
    two_ranks.run(damaged, str(tmp_path), stage)


def by_plain_deepspeed(folder: str, stage: int) -> None:
    engine = seeded_engine(stage, "bf16", {}, seed=0)
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    assert engine.loaded_checkpoint_dp_world_size == 2
    error = error_of(lambda: plain_engine(small_llama(1), stage, "bf16").load_checkpoint(folder))
    assert "2 under HiFT, which has to load it (hift_ds), but the current world size is 2" in error, error


@pytest.mark.parametrize("stage", [1, 3])
def test_plain_deepspeed_does_not_go_on_from_a_checkpoint_whose_state_it_cannot_find(two_ranks, tmp_path, stage):
    two_ranks.run(by_plain_deepspeed, str(tmp_path), stage)


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


def in_memory(stage: int) -> None:
    """`optimizer.load_state_dict` by itself, with what an optimizer of other blocks has given."""
    other = seeded_engine(stage, "bf16", {"layers_per_block": 2}, seed=0)
    run_steps(other, 3)
    engine = seeded_engine(stage, "bf16", {}, seed=1)
    own = other.optimizer.state_dict()
    before = everything(engine)
    if stage:
        error = error_of(lambda: engine.optimizer.load_state_dict([of_all_ranks(own)[0]]))
        assert "the optimizer's state of rank 1 is not given" in error or dist.get_rank() == 0
        engine = seeded_engine(stage, "bf16", {}, seed=1)
    wrong = seeded_engine(stage, "bf16", {}, seed=1, rule="lion").optimizer.state_dict()
    error = error_of(lambda: engine.optimizer.load_state_dict(of_all_ranks(wrong) if stage else wrong))
    assert error.startswith("RuntimeError: the checkpoint was written with another optimizer.type")
    assert not changed(before, everything(engine))
    engine.optimizer.load_state_dict(of_all_ranks(own) if stage else own)  # as DeepSpeed gives it
    for name, param in engine.module.named_parameters():
        theirs = safe_get_full_optimizer_state(dict(other.module.named_parameters())[name], "exp_avg")
        assert torch.equal(safe_get_full_optimizer_state(param, "exp_avg"), theirs), name


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_optimizers_state_goes_over_without_files_and_another_rule_s_is_refused(two_ranks, stage):
    two_ranks.run(in_memory, stage)
