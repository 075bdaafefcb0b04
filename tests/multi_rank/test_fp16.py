"""Loss scaling, and steps skipped for a gradient that is not finite, on two ranks."""

from __future__ import annotations

import math

import pytest
from hift_testing import invariant_cases as cases
from hift_testing.selection import slow
from hift_testing.tolerances import NORM

pytestmark = pytest.mark.multi_rank

UNTOUCHED = {
    "applied": False, "skipped": 1, "scheduled": 0, "rotated": False, "weights": [], "state": [], "norm": math.inf
}  # fmt: skip


def split(results: list[dict]) -> tuple[list[dict], list[dict]]:
    """Skipped and applied attempts, which all ranks must agree upon."""
    attempts = results[0]["attempts"]
    for result in results:
        assert [a["overflow"] for a in result["attempts"]] == [a["overflow"] for a in attempts]
        assert [a["scale"] for a in result["attempts"]] == [a["scale"] for a in attempts]
        for attempt in result["attempts"]:
            if attempt["overflow"]:
                assert {key: attempt[key] for key in UNTOUCHED} == UNTOUCHED
        applied = [attempt for attempt in result["attempts"] if not attempt["overflow"]]
        for block, attempt in zip(result["active"], applied, strict=True):
            assert attempt["weights"] == attempt["state"] == [str(block)]
            assert (attempt["skipped"], attempt["scheduled"], attempt["applied"]) == (0, 1, True)
    return [a for a in attempts if a["overflow"]], [a for a in attempts if not a["overflow"]]


@pytest.mark.parametrize("stage", range(4))
def test_overflows_change_nothing_but_the_scale_and_then_training_goes_on(two_ranks, stage):
    results = two_ranks.run(cases.fp16_run, stage, {"initial_scale_power": 24, "hysteresis": 1}, applied=8)
    skipped, applied = split(results)
    assert 3 <= len(skipped) <= 20
    assert [attempt["scale"] for attempt in skipped] == [2.0 ** (23 - i) for i in range(len(skipped))]
    assert applied[-1]["scale"] == skipped[-1]["scale"]
    for result in results:
        assert result["moved"] > 0.001
        assert result["difference"] == 0.0  # powers of two scale exactly
        assert result["norm"] <= NORM.bound


def test_hysteresis_forgives_the_first_overflow(two_ranks):
    fp16 = {"initial_scale_power": 24, "hysteresis": 2}
    skipped, _ = split(two_ranks.run(cases.fp16_run, 2, fp16, applied=1, compare=False))
    assert [attempt["scale"] for attempt in skipped[:3]] == [2.0**24, 2.0**23, 2.0**22]


def test_the_scale_grows_after_a_window_without_overflow(two_ranks):
    fp16 = {"initial_scale_power": 4, "hysteresis": 1, "loss_scale_window": 2}
    skipped, applied = split(two_ranks.run(cases.fp16_run, 1, fp16, applied=6, compare=False))
    assert skipped == []
    assert [attempt["scale"] for attempt in applied] == [16.0, 16.0, 32.0, 32.0, 64.0, 64.0]


@pytest.mark.parametrize("stage", (slow(0), 1, slow(2), 3))
def test_a_static_scale_cancels_out(two_ranks, stage):
    results = two_ranks.run(cases.fp16_run, stage, {"loss_scale": 128.0}, applied=6)
    skipped, applied = split(results)
    assert skipped == []
    assert {attempt["scale"] for attempt in applied} == {128.0}
    for result in results:
        assert result["difference"] == 0.0


@pytest.mark.parametrize(
    ("stage", "dtype", "value"),
    [
        (0, "bf16", "nan"), (1, "bf16", "inf"), (2, "fp32", "nan"), (3, "fp32", "-inf"),
        slow(0, "fp32", "inf"), slow(1, "fp32", "nan"), slow(2, "bf16", "nan"), slow(3, "bf16", "nan"),
    ],
)  # fmt: skip
def test_one_ranks_bad_gradient_skips_the_step_on_every_rank(two_ranks, stage, dtype, value):
    results = two_ranks.run(cases.poisoned_run, stage, dtype, float(value), steps=4, poisoned=2)
    for result in results:
        assert result["changed"] == [["0", "state 0"], ["1", "state 1"], [], ["2", "state 2"]]
        assert result["blocks"] == [1, 2, 2, 3]
        assert result["applied"] == [True, True, False, True]
        assert result["skipped"] == 1
        assert result["digest"] == results[0]["digest"]
