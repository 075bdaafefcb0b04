"""Cases that run on ranks: save, load, refuse, and `deepspeed.utils.safe_*`."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from hift_testing.error_cases import Reentrant
from hift_testing.invariant_cases import (
    Warnings,
    changed,
    digest,
    digest_of,
    error_of,
    fp16_allowed,
    state_by_block,
    weights_by_block,
)
from hift_testing.parity_cases import RULES
from hift_testing.training import batch_of, cast_parameters, ds_config, engine_of, run_steps, small_llama, whole_weights
from torch.optim.lr_scheduler import LinearLR, SequentialLR

from hift_ds.state.formats import split_master

WARMUP = {"type": "WarmupDecayLR", "params": {"total_num_steps": 40, "warmup_num_steps": 9, "warmup_max_lr": 0.002}}
FP16 = {"enabled": True, "initial_scale_power": 6, "hysteresis": 1, "loss_scale_window": 3}


def _engine(
    stage: int, dtype: str, hift: dict[str, Any], seed: int, scheduler: bool = False, rule: str = "adamw"
) -> Any:
    optimizer = copy.deepcopy(RULES[rule][0])
    config = ds_config(stage, dtype, hift, optimizer=optimizer, **({"scheduler": WARMUP} if scheduler else {}))
    if dtype == "fp16":
        config["fp16"] = dict(FP16)
    with fp16_allowed() if dtype == "fp16" else nullcontext():
        return engine_of(config, small_llama(seed))


def _continue(engine: Any, start: int, steps: int) -> dict[str, Any]:
    """Trains on and returns everything that a resumed run must repeat."""
    trace: list[Any] = []

    def note(step: int) -> None:
        facts = (engine.get_lr(), engine.hift.active_block, engine.optimizer.loss_scale)
        trace.append((step, float(engine.get_global_grad_norm()), *facts, digest_of(weights_by_block(engine))))

    losses = run_steps(engine, steps, start=start, after_step=note)
    counters = (engine.global_steps, engine.global_samples, engine.skipped_steps, engine.hift.cycle)
    return {"trace": trace, "losses": losses, "state": state_by_block(engine), "counters": counters}


def resume(
    folder: str,
    stage: int,
    dtype: str,
    hift: dict[str, Any],
    saved_at: int,
    more: int,
    scheduler: bool = False,
    rule: str = "adamw",
) -> dict[str, Any]:
    """Trains, saves, trains on; a fresh engine on other weights loads and does the same; the first goes back, too."""
    first = _engine(stage, dtype, hift, seed=0, scheduler=scheduler, rule=rule)
    run_steps(first, saved_at)
    first.optimizer.param_groups[0]["weight_decay"] = 0.2  # the config says otherwise
    first.save_checkpoint(folder, client_state={"mine": saved_at})
    expected = _continue(first, saved_at, more)
    fresh = _engine(stage, dtype, hift, seed=1, scheduler=scheduler, rule=rule)
    different = changed(weights_by_block(first), weights_by_block(fresh))
    path, client_state = fresh.load_checkpoint(folder)
    resumed = _continue(fresh, saved_at, more)
    first.load_checkpoint(folder)
    rolled_back = _continue(first, saved_at, more)
    return {
        "expected": expected,
        "resumed": resumed,
        "rolled_back": rolled_back,
        "different": different,
        "path": path,
        "mine": client_state["mine"],
        "whole_module": digest(fresh.module.state_dict().values()) == digest(whole_weights(fresh).values()),
    }


def loaded_within_a_window(folder: str, stage: int) -> list[str]:
    """Fingerprints two steps after a checkpoint, and two after it is loaded with a micro step's gradients there."""
    engine, found = engine_of(ds_config(stage, "bf16", {}, gradient_accumulation_steps=2)), []
    run_steps(engine, 3)
    engine.save_checkpoint(folder)
    for _ in range(2):
        run_steps(engine, 2, start=3)
        found.append(digest_of(weights_by_block(engine)) + digest_of(state_by_block(engine)))
        engine.backward(engine(**batch_of(9, 0, dist.get_rank())).loss)
        engine.step()  # of the first of two micro steps
        engine.load_checkpoint(folder)
    return found


def set_after_a_save(folder: str, stage: int) -> dict[str, Any]:
    """Weights written with `safe_set_full_fp32_param` where stage 3 has just gathered small parameters."""
    engine = _engine(stage, "bf16", {}, seed=0)
    run_steps(engine, 2)
    engine.save_checkpoint(folder)
    named = dict(engine.module.named_parameters())
    generator = torch.Generator().manual_seed(1)
    wanted = {name: torch.randn(weight.shape, generator=generator) for name, weight in whole_weights(engine).items()}
    engine.save_checkpoint(folder)
    for name, param in named.items():
        safe_set_full_fp32_param(param, wanted[name])
    right = cast_parameters(small_llama(0), torch.bfloat16)
    right.load_state_dict(wanted)
    with torch.no_grad():
        losses = [model(**batch_of(3, 0, 0)).loss.item() for model in (engine, right)]
    return {"losses": losses}


def weights_alone(folder: str, stage: int, dtype: str, load: dict[str, bool]) -> dict[str, Any]:
    """An engine with other blocks and another optimizer takes the weights of a checkpoint."""
    first = _engine(stage, dtype, {}, seed=0)
    run_steps(first, 8)
    first.save_checkpoint(folder)
    saved = whole_weights(first)
    config = ds_config(stage, dtype, {"layers_per_block": 2, "order": "top2down"})
    config["optimizer"] = {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}}
    fresh = engine_of(config, small_llama(1))
    run_steps(fresh, 1)
    before = state_by_block(fresh)
    fresh.load_checkpoint(folder, **load)
    loaded = whole_weights(fresh)
    masters = {name: safe_get_full_fp32_param(param) for name, param in fresh.module.named_parameters()}
    facts = {
        "equal": [name for name in saved if not torch.equal(saved[name], loaded[name])],
        "masters": [name for name in saved if not torch.equal(saved[name].float(), masters[name])],
        "steps": [state.step for state in fresh.optimizer.states],
        "position": fresh.hift.active_block,
        "global_steps": fresh.global_steps,
    }
    after = state_by_block(fresh)
    run_steps(fresh, 1, start=1)
    facts["state"] = changed(before, after)
    facts["next"] = changed(after, state_by_block(fresh))
    return facts


def newly_frozen(folder: str, stage: int) -> dict[str, Any]:
    """Weights alone, of parameters that were trained then and are frozen now."""
    first = _engine(stage, "bf16", {}, seed=0)
    run_steps(first, 2)
    first.save_checkpoint(folder)
    fresh = _engine(stage, "bf16", {"frozen": ["embed_tokens"]}, seed=1)
    error = error_of(lambda: fresh.load_checkpoint(folder, load_module_only=True))
    same = not changed({"": digest(whole_weights(first).values())}, {"": digest(whole_weights(fresh).values())})
    return {"error": error, "same": same}


def _edit_manifest(folder: Path, tag: str, **changes: Any) -> None:
    """`identity`: its keys that change."""
    if dist.get_rank() == 0:
        path = folder / tag / "hift.json"
        content = json.loads(path.read_text())
        content["identity"].update(changes.pop("identity", {}))
        content.update(changes)
        path.write_text(json.dumps(content))
    dist.barrier()


def _plain_engine() -> Any:
    """DeepSpeed without HiFT; a client optimizer, because AdamW from the config would compile an operator."""
    config, model = ds_config(1, "bf16", zero_allow_untested_optimizer=True), small_llama(1)
    del config["optimizer"]
    return deepspeed.initialize(model=model, config=config, optimizer=torch.optim.AdamW(model.parameters()))[0]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def refusals(folder: str) -> dict[str, str]:
    """What each checkpoint that does not fit is refused with; ZeRO-1 in bf16 unless said."""
    root = Path(folder)
    engine = _engine(1, "bf16", {}, seed=0)
    run_steps(engine, 2)
    for tag in ("good", "ranks", "format", "broken"):
        engine.save_checkpoint(root, tag=tag)
    sharded = _engine(3, "bf16", {}, seed=0)
    for tag in ("sharded", "sharded ranks"):
        sharded.save_checkpoint(root, tag=tag, save_latest=False)
    plain = _plain_engine()
    plain.save_checkpoint(root, tag="plain", save_latest=False)
    for tag in ("ranks", "sharded ranks"):
        _edit_manifest(root, tag, identity={"number of data-parallel ranks": 4})
    _edit_manifest(root, "format", format=99)
    if dist.get_rank() == 1:
        _truncate(root / "broken" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
        (root / "empty").mkdir()
    dist.barrier()

    def loads(tag: str, stage: int = 1, dtype: str = "bf16", hift: Any = None, only: bool = False, **keys: Any) -> str:
        fresh = engine_of(ds_config(stage, dtype, hift or {}, **keys), small_llama(2))
        before = weights_by_block(fresh)
        error = error_of(lambda: fresh.load_checkpoint(root, tag=tag, load_module_only=only))
        # What is refused has changed nothing, and the engine lives.
        if changed(before, weights_by_block(fresh)):
            error = f"changed weights; {error}"
        run_steps(fresh, 1)
        return error

    found = {
        "stage": loads("good", stage=2),
        "to stage 3": loads("good", stage=3),
        "from stage 3": loads("sharded", stage=2),
        "from stage 3, weights alone": loads("sharded", stage=2, only=True),
        "from stage 3 of other ranks, weights alone": loads("sharded ranks", stage=3, only=True),
        "to stage 0": loads("good", stage=0),
        "ranks": loads("ranks"),
        "format": loads("format"),
        "blocks": loads("good", hift={"layers_per_block": 2}),
        "always active": loads("good", hift={"always_active": ["norm"]}),
        "order": loads("good", hift={"order": "top2down"}),
        "steps_per_block": loads("good", hift={"steps_per_block": 2}),
        "optimizer": loads("good", optimizer={"type": "Lion", "params": {"lr": 1e-3}}),
        "dtype": loads("good", dtype="fp32"),
        "dtype at stage 3, weights alone": loads("sharded", stage=3, dtype="fp32", only=True),
        "plain": loads("plain"),
        "no tag": loads("nowhere"),
        "broken on rank 1": loads("broken"),
        "tags differ": loads(("good", "ranks")[dist.get_rank()]),
    }
    fresh = engine_of(ds_config(1, "bf16", {}), small_llama(2))
    before = weights_by_block(fresh)
    found["empty"] = repr(fresh.load_checkpoint(root / "empty"))
    found["empty changed"] = repr(changed(before, weights_by_block(fresh)))
    fresh.load_checkpoint(root, tag="plain", load_module_only=True)
    found["plain, weights alone"] = repr(changed(weights_by_block_of(plain), weights_by_block_of(fresh)))
    return found


def _everything(engine: Any) -> dict[str, str]:
    """A fingerprint of each thing that a load changes."""
    groups = [{k: value for k, value in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    counters = (engine.global_steps, engine.global_samples, engine.skipped_steps, engine.hift.active_block)
    schedule = None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict()
    facts = {"groups": groups, "counters": counters, "rates": engine.optimizer.rates, "schedule": schedule}
    facts["scale"] = vars(engine.optimizer.loss_scaler)
    state = {f"state of {name}": value for name, value in state_by_block(engine).items()}
    return {**weights_by_block_of(engine), **state, **{name: repr(value) for name, value in facts.items()}}


def _refusal(engine: Any, folder: Path, **load: Any) -> str:
    """The error of a load, and what it has changed nevertheless."""
    before = _everything(engine)
    error = error_of(lambda: engine.load_checkpoint(folder, **load))
    differs = changed(before, _everything(engine))
    return f"{error.replace(str(folder), '')}{f' CHANGED {differs}' if differs else ''}"


def _mixed(root: Path, tag: str, wanted: str, base: str = "new", other: str = "old") -> None:
    """A tag with the files of `base` but those that match `wanted`, which are `other`'s, as after a cut."""
    shutil.copytree(root / base, root / tag)
    for path in (root / other).glob(wanted):
        shutil.copy(path, root / tag / path.name)


def damaged(folder: str, stage: int) -> dict[str, str]:
    """Loads of checkpoints with files that are missing, cut off or of another save; then of a good one."""
    root = Path(folder)
    engine = _engine(stage, "bf16", {}, seed=0, scheduler=True)
    for tag in ("old", "new"):
        run_steps(engine, 2)
        engine.save_checkpoint(root, tag=tag)
    state = "*rank_1_mp_rank_00_optim_states.pt" if stage else "mp_rank_00_model_states.pt"
    weights = "*rank_1_*model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    if dist.get_rank() == 0:
        _mixed(root, "older state", state)
        _mixed(root, "older weights", weights)
        _mixed(root, "newer manifest", "hift.json", base="old", other="new")
        for name in dict.fromkeys((state, weights, "hift.json")):  # at stage 0 one file has both
            for kind, damage in (("no", Path.unlink), ("cut", _truncate)):
                shutil.copytree(root / "new", root / f"{kind} {name}")
                damage(next((root / f"{kind} {name}").glob(name)))
        (root / "latest").write_text("")
        if stage:  # another engine has saved over the tag, and was cut off
            shutil.copytree(root / "new", root / "foreign state")
            torch.save({"optimizer_state_dict": {"zero_stage": stage}}, next((root / "foreign state").glob(state)))
            shutil.copytree(root / "new", root / "swapped state")
            first, second = sorted((root / "swapped state").glob("*optim_states.pt"))
            first.rename(root / "aside")
            second.rename(first)
            (root / "aside").rename(second)
    dist.barrier()
    fresh = _engine(stage, "bf16", {}, seed=1, scheduler=True)
    run_steps(fresh, 3)
    of_ranks = ("foreign state", "swapped state") if stage else ()
    tags = dict.fromkeys(("older state", "older weights", "newer manifest", *of_ranks), "")
    for kind in ("no", "cut"):
        tags.update({f"{kind} {name}": f"{kind} {what}" for name, what in ((state, "state"), (weights, "weights"))})
        tags[f"{kind} hift.json"] = f"{kind} manifest"
    found = {name or tag: _refusal(fresh, root, tag=tag) for tag, name in tags.items()}
    found["empty latest"] = _refusal(fresh, root)
    only = error_of(lambda: fresh.load_checkpoint(root, tag="older weights", load_module_only=True))
    found["weights alone"] = only.replace(str(root), "")
    _, client_state = fresh.load_checkpoint(root, tag="new")
    found["good"] = repr(changed(_everything(engine), _everything(fresh)))
    found["client state"] = repr("hift_save" in client_state)
    found["scripts"] = repr(sorted(path.name for path in root.glob("*.py")))
    return found


def after_a_step_that_failed(folder: str, stage: int) -> dict[str, Any]:
    """Save and load when the last step, which the host has not waited for, had no gradient."""
    root, hift = Path(folder), {"layers_per_block": 1, "kernel": "triton"}
    engine = engine_of(ds_config(stage, "fp32", hift), Reentrant(head=False))
    engine.save_checkpoint(root, tag="start")
    before, facts = (root / "start" / "hift.json").read_text(), {}

    def step() -> None:
        engine.backward(engine(torch.ones(2, 6)))
        engine.step()

    step()
    facts["save"] = error_of(lambda: engine.save_checkpoint(root, tag="start"))
    facts["kept"] = (root / "start" / "hift.json").read_text() == before
    fresh = _everything(engine_of(ds_config(stage, "fp32", hift), Reentrant(head=False)))
    step()
    with Warnings("hift_ds.zero") as messages:
        engine.load_checkpoint(root, tag="start")
    facts["differs"] = changed(fresh, _everything(engine))
    facts["warnings"] = list(messages)
    return facts


def _grouped(model: torch.nn.Module, decayed: str, split: bool = True) -> dict[str, Any]:
    """`model_parameters` with the weights that match in a group of their own."""
    inside = [param for name, param in model.named_parameters() if re.search(decayed, name)]
    outside = [param for name, param in model.named_parameters() if not re.search(decayed, name)]
    groups = [{"params": inside, "weight_decay": 0.1}, {"params": outside, "weight_decay": 0.0}]
    return {"model_parameters": groups if split else [*inside, *outside]}


def _phases(count: int) -> Callable[[torch.optim.Optimizer], SequentialLR]:
    """A schedule in several phases of two steps each."""
    return lambda holder: SequentialLR(holder, [LinearLR(holder) for _ in range(count)], list(range(2, 2 * count, 2)))


def _sgd(momentum: float) -> dict[str, Any]:
    return {"optimizer": {"type": "SGD", "params": {"lr": 1e-2, "momentum": momentum}}}


def _larger(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = small_llama(seed)
    model.lm_head = torch.nn.Linear(40, 100, bias=False)
    model.config.vocab_size = 100
    return model


def _with_buffer(seed: int) -> torch.nn.Module:
    model = small_llama(seed)
    model.register_buffer("extra", torch.ones(3))
    return model


# name -> stage, then (hift section, keys of the config, model, param groups) of the run that saves and of the other
_PLAIN = ({}, {}, small_llama, lambda model: {})
_SCHEDULED = ({}, {"scheduler": WARMUP}, small_llama, lambda model: {})
MISFITS: dict[str, Any] = {
    "another number of groups": (0, _PLAIN, ({}, {}, small_llama, lambda m: _grouped(m, "proj"))),
    "other groups": (
        3, ({}, {}, small_llama, lambda m: _grouped(m, "proj")), ({}, {}, small_llama, lambda m: _grouped(m, "norm")),
    ),
    "momentum on": (1, ({}, _sgd(0.0), small_llama, lambda m: {}), ({}, _sgd(0.9), small_llama, lambda m: {})),
    "momentum off": (2, ({}, _sgd(0.9), small_llama, lambda m: {}), ({}, _sgd(0.0), small_llama, lambda m: {})),
    "other blocks": (2, _PLAIN, ({"layers_per_block": 2}, {}, small_llama, lambda m: {})),
    "another shape": (3, _PLAIN, ({}, {}, _larger, lambda m: {})),
    "another shape below stage 3": (1, _PLAIN, ({}, {}, _larger, lambda m: {})),
    "another name": (0, _PLAIN, ({}, {}, _with_buffer, lambda m: {})),
    "no schedule": (0, _PLAIN, _SCHEDULED),
    "another schedule": (
        2, _SCHEDULED,
        ({}, {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}}, small_llama, lambda m: {}),
    ),
    "another schedule of the same class": (
        1, ({}, {}, small_llama, lambda model: {"lr_scheduler": _phases(3)}),
        ({}, {}, small_llama, lambda model: {"lr_scheduler": _phases(2)}),
    ),
    "a schedule by cycles": (1, _SCHEDULED, ({"lr_update": "paper"}, *_SCHEDULED[1:])),
}  # fmt: skip


def misfits(folder: str, name: str) -> str:
    """The refusal of a checkpoint of a run that differs in one thing."""
    stage, *runs = MISFITS[name]
    engines = []
    for seed, (hift, keys, model_of, arguments) in enumerate(runs):
        model = model_of(seed)
        engines.append(engine_of(ds_config(stage, "bf16", hift, **copy.deepcopy(keys)), model, **arguments(model)))
        run_steps(engines[-1], 2 + seed)
    engines[0].save_checkpoint(folder)
    refusal = _refusal(engines[1], Path(folder))
    run_steps(engines[1], 1, start=3)
    return refusal


def foreign_state(stage: int) -> dict[str, str]:
    """`optimizer.load_state_dict` by itself, with what an optimizer of other blocks has given."""
    other = _engine(stage, "bf16", {"layers_per_block": 2}, seed=0)
    engine = _engine(stage, "bf16", {}, seed=1)
    state = other.optimizer.state_dict()
    before = _everything(engine)
    # as DeepSpeed gives it: all ranks' at stages 1 to 3
    error = error_of(lambda: engine.optimizer.load_state_dict([state] * dist.get_world_size() if stage else state))
    return {"error": error, "changed": repr(changed(before, _everything(engine)))}


def weights_by_block_of(engine: Any) -> dict[str, str]:
    """A fingerprint of each parameter, with HiFT or without."""
    return {name: digest([tensor]) for name, tensor in whole_weights(engine).items()}


def exported(folder: str, stage: int, dtype: str) -> dict[str, Any]:
    """`save_16bit_model` after a few steps."""
    config = ds_config(stage, dtype, {}, zero_optimization={"stage3_gather_16bit_weights_on_model_save": True})
    engine = engine_of(config, small_llama(0))
    run_steps(engine, 3)
    saved = engine.save_16bit_model(folder)
    dist.barrier()
    content, weights = torch.load(Path(folder, "pytorch_model.bin"), weights_only=True), whole_weights(engine)
    run_steps(engine, 1, start=3)  # the export has left the engine able to train
    wrong = [name for name in weights if name not in content or not torch.equal(content[name], weights[name])]
    return {"saved": saved, "wrong": wrong, "dtypes": sorted({str(tensor.dtype) for tensor in content.values()})}


def fragments(stage: int, dtype: str) -> dict[str, Any]:
    """What deepspeed.utils reads for every parameter, in the middle of a window and after a step."""
    engine = _engine(stage, dtype, {}, seed=0)
    run_steps(engine, 8)
    named = dict(engine.module.named_parameters())
    active = set(engine.hift.blocks[engine.hift.active_block].fqns)
    engine.backward(engine(**batch_of(8, 0, dist.get_rank())).loss)
    grads = {name: safe_get_full_grad(param) for name, param in named.items()}
    engine.step()
    masters = {name: safe_get_full_fp32_param(param) for name, param in named.items()}
    moments = {name: safe_get_full_optimizer_state(param, "exp_avg") for name, param in named.items()}
    weights = whole_weights(engine)
    shapes = {name: weight.shape for name, weight in weights.items()}
    return {
        "masters": digest(masters.values()),
        "moments": digest(moments.values()),
        "grads": digest(grad.float() for grad in grads.values() if grad is not None),
        "with_grad": sorted(name for name, grad in grads.items() if grad is not None) == sorted(active),
        "after_step": [name for name, param in named.items() if safe_get_full_grad(param) is not None],
        "wrong": [
            name for name, master in masters.items()
            if master.shape != shapes[name] or moments[name].shape != shapes[name] or master.dtype != torch.float32
            or not torch.equal(master.to(weights[name].dtype), weights[name])
        ],
        "finer": sum(not torch.equal(master, weights[name].float()) for name, master in masters.items()),
        "still": [name for name, moment in moments.items() if not moment.any()],
        "error": error_of(lambda: safe_get_full_optimizer_state(named["lm_head.weight"], "momentum")),
    }  # fmt: skip


def fragments_set(stage: int, dtype: str, hift: dict[str, Any] | None = None) -> dict[str, Any]:
    """Writes master, state and gradient of an active and of an inactive parameter."""
    engine = _engine(stage, dtype, hift or {}, seed=0)
    run_steps(engine, 6)
    named, facts = dict(engine.module.named_parameters()), {}
    others = {name for name in named if name not in ("model.embed_tokens.weight", "lm_head.weight")}
    before = weights_by_block_of(engine)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # block 0 is active, the head's is the last
        param = named[name]
        value = torch.arange(safe_get_full_fp32_param(param).numel(), dtype=torch.float32).view(96, 40) / 1024 + 2**-12
        safe_set_full_fp32_param(param, value)
        safe_set_full_optimizer_state(param, value + 1, "exp_avg_sq")
        weight = whole_weights(engine)[name]
        facts[name] = [
            torch.equal(safe_get_full_fp32_param(param), value),
            torch.equal(safe_get_full_optimizer_state(param, "exp_avg_sq"), value + 1),
            torch.equal(weight, split_master(value)[0] if hift else value.to(weight.dtype)),  # ties: half up
        ]
    facts["others"] = [name for name in changed(before, weights_by_block_of(engine)) if name in others]
    engine.backward(engine(**batch_of(6, 0, dist.get_rank())).loss)
    ones = torch.ones(96, 40)
    safe_set_full_grad(named["model.embed_tokens.weight"], ones)
    facts["grad"] = torch.equal(safe_get_full_grad(named["model.embed_tokens.weight"]).float(), ones)
    facts["inactive grad"] = error_of(lambda: safe_set_full_grad(named["lm_head.weight"], ones))
    engine.step()
    facts["norm"] = float(engine.get_global_grad_norm())
    return facts


def other_form(folder: str, hift: dict[str, Any]) -> str:
    """The error of loading a checkpoint of `hift` into a run with fp32 state."""
    first = _engine(2, "bf16", hift, seed=0)
    run_steps(first, 1)
    first.save_checkpoint(folder)
    return error_of(lambda: _engine(2, "bf16", {}, seed=1).load_checkpoint(folder))
