"""Cases that run on ranks: save, load, refuse, and `deepspeed.utils.safe_*`."""

from __future__ import annotations

import copy
import json
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
from hift_testing.invariant_cases import (
    changed,
    digest,
    digest_of,
    error_of,
    fp16_allowed,
    state_by_block,
    weights_by_block,
)
from hift_testing.parity_cases import RULES
from hift_testing.training import batch_of, ds_config, engine_of, run_steps, small_llama, whole_weights

from hift_ds.forms import split_master

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
        engine.load_checkpoint(folder)
    return found


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
        # What the manifest refuses has changed nothing, and the engine lives.
        if tag != "broken" and changed(before, weights_by_block(fresh)):
            error = f"changed weights; {error}"
        if tag != "broken":
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
