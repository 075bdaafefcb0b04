"""Loss scaling, and steps skipped for a gradient that is not finite, on two ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from hift_testing import tolerances
from hift_testing.disturbed import poisoned_run
from hift_testing.fingerprints import all_by_block, changed
from hift_testing.reference import ReferenceHiFT
from hift_testing.selection import slow
from hift_testing.training import (
    ADAMW,
    batch_of,
    cast_parameters,
    ds_config,
    engine_of,
    fp16_allowed,
    largest_difference,
    run_steps,
    small_llama,
    whole_weights,
)

pytestmark = pytest.mark.multi_rank


class ScaledReference(ReferenceHiFT):
    """The loss is multiplied by `loss_scale` before backward, the averaged fp32 gradient divided by it."""

    loss_scale = 1.0

    def _gradients(self, batch, active, micro_steps):
        return super()._gradients(batch, active, micro_steps / self.loss_scale)

    def _averaged_gradients(self, batches, active):
        grads = super()._averaged_gradients(batches, active)
        return {name: grad / self.loss_scale for name, grad in grads.items()}


def adamw(members: list[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([tensor for _, tensor in members], foreach=False, **ADAMW["params"])


def fp16_run(stage: int, fp16: dict[str, Any], applied: int, compare: bool = True) -> list[tuple[bool, float]]:
    """Trains until `applied` steps have been applied, the same batch again after a skipped one.

    A skipped step changes nothing. With `compare`, weights and the last norm are those of a reference that starts at
    the scale which the run ended with.

    Returns:
        Of each engine.step(), whether it overflowed, and the loss scale after it.
    """
    with fp16_allowed():
        config = ds_config(stage, "fp16", {"lr_update": "step"})
        warmup = {"warmup_num_steps": 10, "warmup_type": "linear", "warmup_min_lr": 1e-3, "warmup_max_lr": 2e-3}
        config["scheduler"] = {"type": "WarmupLR", "params": warmup}
        config["fp16"] = {"enabled": True, **fp16}
        engine = engine_of(config)
    attempts, rates, step, before = [], [], 0, all_by_block(engine)
    while step < applied:
        assert len(attempts) <= 40, "the loss scale does not come down"
        active, iteration = engine.hift.active_block, engine.lr_scheduler.last_batch_iteration
        skipped = engine.skipped_steps
        run_steps(engine, 1, start=step)
        after, overflow = all_by_block(engine), engine.optimizer.overflow
        attempts.append((overflow, engine.optimizer.loss_scale))
        scheduled = engine.lr_scheduler.last_batch_iteration - iteration
        assert (engine.skipped_steps - skipped, scheduled) == ((1, 0) if overflow else (0, 1))
        assert engine.was_step_applied() != overflow
        if overflow:
            assert engine.hift.active_block == active
            assert changed(before, after) == []
            assert engine.get_global_grad_norm() == math.inf
        else:
            assert active == step % 6
            assert changed(before, after) == [str(active), f"state {active}"]
            rates.append(engine.get_lr()[0])
            step += 1
        before = after
    if compare:
        model, start = (cast_parameters(small_llama(), torch.float16) for _ in range(2))
        oracle = ScaledReference(
            model, [block.fqns for block in engine.hift.blocks], engine.hift.order, adamw, lambda step: rates[step],
            accumulate_before_reducing=stage < 2,
        )  # fmt: skip
        oracle.loss_scale = engine.optimizer.loss_scale
        for step in range(applied):
            oracle.step([[batch_of(step, 0, rank)] for rank in range(dist.get_world_size())])
        weights = whole_weights(engine)
        assert largest_difference(weights, dict(start.named_parameters())) > 0.001
        assert largest_difference(weights, dict(model.named_parameters())) == 0.0  # powers of two scale exactly
        off = abs(engine.get_global_grad_norm() - oracle.norms[-1]) / oracle.norms[-1]
        assert off <= tolerances.NORM.bound, tolerances.NORM.reason
    return attempts


def scales_of(results: list[list[tuple[bool, float]]]) -> tuple[list[float], list[float]]:
    """After skipped and after applied steps, which all ranks must agree upon."""
    attempts = results[0]
    assert all(result == attempts for result in results)
    return [scale for overflow, scale in attempts if overflow], [scale for overflow, scale in attempts if not overflow]


@pytest.mark.parametrize("stage", (slow(0), slow(1), 2, 3))
def test_overflows_change_nothing_but_the_scale_and_then_training_goes_on(two_ranks, stage):
    fp16 = {"initial_scale_power": 24, "hysteresis": 1}
    skipped, applied = scales_of(two_ranks.run(fp16_run, stage, fp16, applied=8))
    assert 3 <= len(skipped) <= 20
    assert skipped == [2.0 ** (23 - i) for i in range(len(skipped))]
    assert applied[-1] == skipped[-1]


def test_hysteresis_forgives_the_first_overflow(two_ranks):
    fp16 = {"initial_scale_power": 24, "hysteresis": 2}
    skipped, _ = scales_of(two_ranks.run(fp16_run, 2, fp16, applied=1, compare=False))
    assert skipped[:3] == [2.0**24, 2.0**23, 2.0**22]


def test_the_scale_grows_after_a_window_without_overflow(two_ranks):
    fp16 = {"initial_scale_power": 4, "hysteresis": 1, "loss_scale_window": 2}
    skipped, applied = scales_of(two_ranks.run(fp16_run, 1, fp16, applied=6, compare=False))
    assert skipped == []
    assert applied == [16.0, 16.0, 32.0, 32.0, 64.0, 64.0]


@pytest.mark.parametrize("stage", (slow(0), 1, slow(2), 3))
def test_a_static_scale_cancels_out(two_ranks, stage):
    skipped, applied = scales_of(two_ranks.run(fp16_run, stage, {"loss_scale": 128.0}, applied=6))
    assert skipped == []
    assert set(applied) == {128.0}


@pytest.mark.parametrize(
    ("stage", "dtype", "value"),
    [
        (0, "bf16", "nan"), (1, "bf16", "inf"), (2, "fp32", "nan"), (3, "fp32", "-inf"),
        slow(0, "fp32", "inf"), slow(1, "fp32", "nan"), slow(2, "bf16", "nan"), slow(3, "bf16", "nan"),
    ],
)  # fmt: skip
def test_one_ranks_bad_gradient_skips_the_step_on_every_rank(two_ranks, stage, dtype, value):
    results = two_ranks.run(poisoned_run, stage, dtype, float(value), steps=4, poisoned=2)
    for result in results:
        assert result["changed"] == [["0", "state 0"], ["1", "state 1"], [], ["2", "state 2"]]
        assert result["blocks"] == [1, 2, 2, 3]
        assert result["applied"] == [True, True, False, True]
        assert result["skipped"] == 1
        assert result["digest"] == results[0]["digest"]
