"""The delayed learning rate on a running engine, against rates computed by hand: six blocks, three cycles."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from hift_testing.disturbed import poison_next_gradient
from hift_testing.training import ds_config, engine_of, run_steps, small_llama
from torch.optim.lr_scheduler import LambdaLR, StepLR

pytestmark = pytest.mark.multi_rank

STEPS = 18
# WarmupDecayLR, 4 warm-up steps to 0.014, 0 at step 18. DeepSpeed's schedulers begin one step late (iteration -1), so
# step s trains with the value of iteration s - 1.
CONFIGURED = [0.0, 0.0, 0.0035, 0.007, 0.0105, *[(19 - step) / 1000 for step in range(5, 18)]]
EXPECTED = {
    # at the cycles' middle steps 3, 9 and 15
    ("config", "cycle"): [0.007] * 6 + [0.010] * 6 + [0.004] * 6,
    # one step of the scheduler per cycle: iterations -1, 0 and 1
    ("config", "paper"): [0.0] * 12 + [0.0035] * 6,
    ("config", "step"): CONFIGURED,
    # (step + 1) / 1000
    ("object", "cycle"): [0.004] * 6 + [0.010] * 6 + [0.016] * 6,
    ("object", "paper"): [0.001] * 6 + [0.002] * 6 + [0.003] * 6,
    ("object", "step"): [(step + 1) / 1000 for step in range(18)],
    # 0.001, halved at steps 5, 10 and 15
    ("by torch's name", "cycle"): [0.001] * 6 + [0.0005] * 6 + [0.000125] * 6,
    ("callable", "cycle"): [0.001] * 6 + [0.0005] * 6 + [0.000125] * 6,
    ("callable", "paper"): [0.001] * 18,
    ("callable", "step"): [0.001] * 5 + [0.0005] * 5 + [0.00025] * 5 + [0.000125] * 3,
    # step / 1000, unknown to the engine: latched at the cycle's start, and once more because it was 0 there
    ("outside", "cycle"): [0.0] + [0.001] * 5 + [0.006] * 6 + [0.012] * 6,
    ("outside", "step"): [step / 1000 for step in range(18)],
}


def rates(
    stage: int, lr_update: str, scheduler: str, steps: int, poisoned: tuple[int, ...] = (), lr: float = 1e-3
) -> dict[str, Any]:
    """Learning rates in force at each step of a run over six blocks.

    Args:
        scheduler: `config` (linear warm-up and decay), `object` (LambdaLR: (step + 1) * lr), `callable` (StepLR: halved
            every 5 steps), `by torch's name` (that in the config), `decay` (LambdaLR: linear to 0 at the end),
            `one_rank_differs` (as `object`, with a file open on rank 1) or `outside` (LambdaLR: step * lr, stepped by
            the caller after each engine.step()).
        poisoned: Steps whose gradient has a nan on the last rank.
    """
    model, config, given = small_llama(), ds_config(stage, "fp32", {"lr_update": lr_update}), {}
    config["optimizer"]["params"]["lr"] = lr
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if scheduler == "config":
        params = {"total_num_steps": 18, "warmup_num_steps": 4, "warmup_type": "linear", "warmup_max_lr": 0.014}
        config["scheduler"] = {"type": "WarmupDecayLR", "params": params}
    elif scheduler == "by torch's name":
        config["scheduler"] = {"type": "StepLR", "params": {"step_size": 5, "gamma": 0.5}}
    elif scheduler in ("object", "one_rank_differs"):
        given = {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, lambda step: step + 1)}
        if scheduler == "one_rank_differs" and dist.get_rank() == 1:
            given["lr_scheduler"].log = open(os.devnull, "w")  # noqa: SIM115
    elif scheduler == "decay":
        schedule = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        given = {"optimizer": optimizer, "lr_scheduler": schedule}
    elif scheduler == "callable":
        given = {"lr_scheduler": lambda holder: StepLR(holder, 5, 0.5)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = engine_of(config, model, **given)
        outside = LambdaLR(engine.basic_optimizer, lambda step: float(step)) if scheduler == "outside" else None
        found = {"rates": [], "blocks": [], "scheduled": []}
        for step in range(steps):
            if step in poisoned:
                poison_next_gradient(engine)
            run_steps(engine, 1, start=step)
            if outside is not None:
                outside.step()
            found["rates"].append(engine.get_lr()[0])
            found["blocks"].append(engine.hift.active_block)
            found["scheduled"].append(engine.optimizer.param_groups[0]["lr"])
    found["warnings"] = [str(w.message) for w in caught if "lr_scheduler" in str(w.message)]
    return found


@pytest.mark.parametrize(("scheduler", "lr_update"), EXPECTED)
def test_rates_in_force_equal_those_computed_by_hand(two_ranks, scheduler, lr_update):
    stage = list(EXPECTED).index((scheduler, lr_update)) % 3  # the schedule knows no stage; each is used
    for found in two_ranks.run(rates, stage, lr_update, scheduler, STEPS):
        assert found["rates"] == pytest.approx(EXPECTED[scheduler, lr_update], abs=1e-12)
        assert found["blocks"] == [1, 2, 3, 4, 5, 0] * 3
        assert found["warnings"] == []


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (2, [0.0005] * 2),  # a run shorter than half a cycle: its own middle, step 1
        (8, [0.001 * 5 / 8] * 6 + [0.001 * 1 / 8] * 2),  # of the last cycle two steps are left: the second of them
    ],
)
def test_a_decay_to_0_trains_to_the_run_s_last_step(two_ranks, steps, expected):
    for found in two_ranks.run(rates, 1, "cycle", "decay", steps):
        assert found["rates"] == pytest.approx(expected, abs=1e-12)


def test_if_one_rank_s_scheduler_cannot_be_looked_ahead_all_ranks_read_it_at_the_cycle_s_start(two_ranks):
    for found in two_ranks.run(rates, 0, "cycle", "one_rank_differs", 8):
        assert found["rates"] == pytest.approx([0.001] * 6 + [0.007] * 2, abs=1e-12)


def test_look_ahead_leaves_the_users_scheduler_where_it_was(two_ranks):
    for found in two_ranks.run(rates, 1, "cycle", "object", STEPS):
        assert found["scheduled"] == pytest.approx([(step + 2) / 1000 for step in range(18)], abs=1e-12)


@pytest.mark.parametrize(
    ("lr_update", "expected"),
    [("step", [0.001, 0.002, 0.002, 0.003, 0.003, 0.004]), ("cycle", [0.004] * 6)],
)
def test_a_skipped_step_moves_neither_schedule_nor_rotation(two_ranks, lr_update, expected):
    for found in two_ranks.run(rates, 2, lr_update, "object", 6, poisoned=(2, 4)):
        assert found["rates"] == pytest.approx(expected, abs=1e-12)
        assert found["blocks"] == [1, 2, 2, 3, 3, 4]
        assert found["scheduled"] == pytest.approx([0.002, 0.003, 0.003, 0.004, 0.004, 0.005], abs=1e-12)
        assert found["warnings"] == []


def test_a_cycle_whose_first_steps_are_skipped_latches_its_rate_all_the_same(two_ranks):
    for found in two_ranks.run(rates, 0, "cycle", "object", 8, poisoned=(0, 1)):
        # nothing in force before the first applied step: the scheduler's own
        assert found["rates"] == pytest.approx([0.001] * 2 + [0.004] * 6, abs=1e-12)
        assert found["blocks"] == [0, 0, 1, 2, 3, 4, 5, 0]
