"""A run that is saved, resumed and rolled back, on ranks; the engines whose checkpoints tests take."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

from hift_testing.fingerprints import changed, digest, digest_of, state_by_block, weights_by_block
from hift_testing.parity import RULES
from hift_testing.training import ds_config, engine_of, fp16_allowed, run_steps, small_llama, whole_weights

WARMUP = {"type": "WarmupDecayLR", "params": {"total_num_steps": 40, "warmup_num_steps": 9, "warmup_max_lr": 0.002}}
FP16 = {"enabled": True, "initial_scale_power": 6, "hysteresis": 1, "loss_scale_window": 3}


def seeded_engine(
    stage: int, dtype: str, hift: dict[str, Any], seed: int, scheduler: bool = False, rule: str = "adamw"
) -> Any:
    """An engine on the small model of a seed; `scheduler`: with a warm-up."""
    optimizer = copy.deepcopy(RULES[rule][0])
    config = ds_config(stage, dtype, hift, optimizer=optimizer, **({"scheduler": WARMUP} if scheduler else {}))
    if dtype == "fp16":
        config["fp16"] = dict(FP16)
    with fp16_allowed() if dtype == "fp16" else nullcontext():
        return engine_of(config, small_llama(seed))


def _continue(engine: Any, start: int, steps: int) -> list[Any]:
    """Trains on and returns everything that a resumed run must repeat: facts of each step, then state and counters."""
    found: list[Any] = []
    for step in range(start, start + steps):
        losses = run_steps(engine, 1, start=step)
        facts = (engine.get_lr(), engine.hift.active_block, engine.optimizer.loss_scale)
        found.append((losses, float(engine.get_global_grad_norm()), *facts, digest_of(weights_by_block(engine))))
    counters = (engine.global_steps, engine.global_samples, engine.skipped_steps, engine.hift.cycle)
    return [*found, state_by_block(engine), counters]


def _assert_repeated(found: list[Any], expected: list[Any]) -> None:
    for index, (fact, wanted) in enumerate(zip(found, expected, strict=True)):
        assert fact == wanted, f"{index}: {fact}, not {wanted}"


def resume(
    folder: str,
    stage: int,
    dtype: str,
    hift: dict[str, Any],
    saved_at: int,
    more: int,
    scheduler: bool = False,
    rule: str = "adamw",
) -> bool:
    """Trains, saves, trains on; a fresh engine on other weights loads and does the same; the first goes back, too.

    Returns:
        Whether the module holds whole weights, as it does below stage 3.
    """
    first = seeded_engine(stage, dtype, hift, 0, scheduler, rule)
    run_steps(first, saved_at)
    first.optimizer.param_groups[0]["weight_decay"] = 0.2  # the config says otherwise
    first.save_checkpoint(folder, client_state={"mine": saved_at})
    expected = _continue(first, saved_at, more)
    fresh = seeded_engine(stage, dtype, hift, 1, scheduler, rule)
    assert len(changed(weights_by_block(first), weights_by_block(fresh))) >= 6
    _, client_state = fresh.load_checkpoint(folder)
    assert client_state["mine"] == saved_at
    _assert_repeated(_continue(fresh, saved_at, more), expected)
    first.load_checkpoint(folder)
    _assert_repeated(_continue(first, saved_at, more), expected)
    return digest(fresh.module.state_dict().values()) == digest(whole_weights(fresh).values())
