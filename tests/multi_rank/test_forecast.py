"""What the planner forecasts is what real steps take: peaks by block and phase, and bytes handed to collectives."""

from __future__ import annotations

import pytest
from hift_testing import forecast_cases as cases
from hift_testing.selection import slow

pytestmark = pytest.mark.multi_rank

TOLERANCES = {"forward": 0.005, "backward": 0.005, "update": 0.01}  # of the bytes on the device: scalars
SMALL = 2048  # bytes of norms and flags that collectives carry beside gradients and weights


def assert_forecast(plan: dict, facts: dict, held: int = 0) -> None:
    """`held`: bytes that gloo's threads may still hold of the update's last bucket when the next is there."""
    beside = {"update": held}
    wrong = {
        (block, phase): (forecast[phase], measured[phase])
        for block, (forecast, measured) in enumerate(zip(plan["forecast"], facts["measured"], strict=True))
        for phase, tolerance in TOLERANCES.items()
        if not -tolerance * measured[phase]
        <= measured[phase] - forecast[phase]
        <= tolerance * measured[phase] + beside.get(phase, 0)
    }
    assert wrong == {}
    for peak, measured in zip(plan["peaks"], facts["measured"], strict=True):
        assert abs(peak - max(measured.values())) <= 0.01 * peak


@pytest.mark.parametrize(
    ("stage", "dtype", "keywords"),
    [
        slow(0, "fp32", {}),
        slow(1, "bf16", {"gradient_accumulation_steps": 2}),
        (2, "bf16", {"hift": {"always_active": ["layers.2.mlp.down_proj"], "layers_per_block": 2}}),
        slow(2, "fp32", {"checkpointing": True, "attention": "eager"}),
        slow(3, "bf16", {"hift": {"order": "top2down"}}),
        slow(3, "bf16", {"gradient_accumulation_steps": 2, "hift": {"order": "top2down"}}),
        slow(2, "bf16", {"optimizer": {"type": "Adafactor", "params": {"lr": 1e-2}}, "hift": {"state": {}}}),
    ],
)
def test_forecast_is_what_two_ranks_take(two_ranks, stage, dtype, keywords):
    results = two_ranks.run(cases.forecast_and_measured, stage, dtype, **keywords)
    plan = results[0]
    for facts in results:
        assert_forecast(plan, facts, plan["bucket"] if stage in (1, 2) else 0)
        beside = [counted - forecast for forecast, counted in zip(plan["network"], facts["counted"], strict=True)]
        assert all(0 <= more <= SMALL for more in beside), beside


ROWS = {"activations": (cases.ROWS, cases.SEQ), "gradients": (1, 4)}


@pytest.mark.parametrize(
    ("stage", "dtype", "weighs_more"),
    [
        (0, "bf16", "gradients"), (3, "fp32", "activations"), slow(0, "bf16", "activations"),
        slow(3, "fp32", "gradients"),
    ],
)  # fmt: skip
def test_forecast_is_what_one_rank_takes_whatever_weighs_more(one_rank, stage, dtype, weighs_more):
    """Here no gloo holds or copies buckets, as its reduce-scatter does."""
    (facts,) = one_rank.run(cases.forecast_and_measured, stage, dtype, rows=ROWS[weighs_more])
    assert_forecast(facts, facts)
    assert facts["network"] == [0] * len(facts["network"])


TORCH = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
FUSED = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}}
ADAGRAD = {"type": "Adagrad", "params": {"lr": 1e-3, "weight_decay": 0.1}}
SGD = {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}}


def assert_full_forecast(results) -> None:
    for facts in results:
        wrong = [fact for fact in facts if not -0.01 <= fact[1] / fact[2] - 1 <= 0.015]
        assert wrong == []


@pytest.mark.parametrize(
    ("stage", "dtype", "optimizer", "micro_steps", "zero"),
    [
        (0, "fp32", SGD, 1, {}), (1, "fp32", FUSED, 1, {"overlap_comm": True}), (2, "bf16", TORCH, 1, {}),
        (3, "fp32", TORCH, 1, {"reduce_bucket_size": 500_000}),
        slow(0, "bf16", TORCH, 1, {}), slow(0, "fp32", TORCH, 2, {}), slow(1, "bf16", TORCH, 2, {}),
        slow(1, "fp32", FUSED, 1, {}), slow(1, "bf16", ADAGRAD, 1, {}),
        slow(2, "bf16", FUSED, 1, {"overlap_comm": True}), slow(2, "fp32", TORCH, 2, {}), slow(3, "bf16", FUSED, 2, {}),
        slow(3, "fp32", TORCH, 1, {}),
    ],
)  # fmt: skip
def test_forecast_of_full_fine_tuning_is_what_deepspeeds_own_optimizers_take(
    two_ranks, stage, dtype, optimizer, micro_steps, zero
):
    more = {"optimizer": optimizer, "gradient_accumulation_steps": micro_steps, "zero": zero}
    assert_full_forecast(two_ranks.run(cases.full_forecast_and_measured, stage, dtype, **more))


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), slow(1, "fp32"), slow(2, "bf16"), slow(3, "bf16")])
def test_forecast_of_full_fine_tuning_is_what_it_takes_on_one_rank(one_rank, stage, dtype):
    assert_full_forecast(one_rank.run(cases.full_forecast_and_measured, stage, dtype, optimizer=TORCH))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_forecast_of_full_fine_tuning_is_what_deepspeeds_compiled_adam_takes(two_ranks, stage):
    assert_full_forecast(two_ranks.run(cases.full_forecast_and_measured, stage, "bf16"))


MIB = 2**20


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [None, "SGD"])
def test_null_takes_the_largest_blocks_that_fit_the_rank_with_the_least_memory(two_ranks, optimizer):
    found = [
        two_ranks.run(cases.chosen_blocks, memory, {}, optimizer)
        for memory in ([10**12, 8 * MIB], [10**12, 18 * MIB], [10**12, 10**12])
    ]
    for results in found:
        assert results[0] == results[1]
        assert results[0]["layers"] == results[0]["alone"]
    numbers = [results[0]["layers"] for results in found]
    assert numbers[0] == 1 and numbers == sorted(numbers)
    assert found[-1][0] == {"layers": 6, "alone": 6, "blocks": 1}


def test_a_choice_that_fails_on_rank_0_fails_on_every_rank(two_ranks):
    assert two_ranks.run(cases.choice_that_fails) == [
        "ValueError: no choice", "RuntimeError: rank 0 failed: ValueError: no choice",
    ]  # fmt: skip


def test_explicit_blocks_leave_nothing_to_choose(two_ranks):
    blocks = [["embed", "layers.[01]"], ["layers.[23]", "model.norm", "lm_head"]]
    for facts in two_ranks.run(cases.explicit_blocks, blocks):
        assert facts == 2
