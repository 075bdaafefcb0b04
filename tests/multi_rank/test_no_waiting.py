"""A fused step leaves norm, clipping and the checks on the device: the host hears of them one step later."""

import pytest
from hift_testing import invariant_cases, wait_cases
from hift_testing.parity_cases import RULES
from hift_testing.selection import slow

pytestmark = pytest.mark.multi_rank

FUSED = {"kernel": "triton"}
STEPS = 6  # two rotations of three blocks


@pytest.mark.parametrize(
    ("stage", "dtype", "hift", "rule"),
    [
        (0, "fp32", {}, "adamw"), slow(1, "bf16", {}, "adafactor"),
        (2, "bf16", {"state": {"master": "split16"}}, "adamw"),
        (3, "bf16", {"always_active": ["norm"], "state": {"moments": "int8"}}, "adamw"),
        slow(2, "fp32", {}, "adafactor"),
    ],
)  # fmt: skip
def test_a_fused_step_never_waits_for_the_device(two_ranks, stage, dtype, hift, rule):
    for facts in two_ranks.run(wait_cases.of_steps, stage, dtype, {**FUSED, **hift}, RULES[rule][0]):
        assert facts["waits"] == []
        assert facts["read"] == STEPS - 1


def test_an_eager_step_is_seen_to_wait_once(two_ranks):
    for facts in two_ranks.run(wait_cases.of_steps, 2, "bf16", {"kernel": "torch"}):
        assert len(facts["waits"]) == STEPS, facts


@pytest.mark.parametrize(
    ("stage", "dtype", "value"), [(0, "fp32", "inf"), (1, "bf16", "nan"), (2, "fp32", "-inf"), (3, "bf16", "nan")]
)
def test_a_bad_gradient_leaves_the_update_out_and_is_reported_while_the_turn_passes(two_ranks, stage, dtype, value):
    results = two_ranks.run(invariant_cases.poisoned_run, stage, dtype, float(value), steps=5, poisoned=2, hift=FUSED)
    for result in results:
        assert result["changed"] == [["0", "state 0"], ["1", "state 1"], [], ["3", "state 3"], ["4", "state 4"]]
        assert result["blocks"] == [1, 2, 3, 4, 5]
        assert result["counts"] == [1, 1, 0, 1, 1, 0]
        assert result["digest"] == results[0]["digest"]
        (warning,) = result["warnings"]
        assert warning == "the gradient of block 2 (model.layers.1) was not finite; its update was left out"


@pytest.mark.parametrize("stage", range(4))
def test_ranks_that_disagree_change_nothing_and_raise_at_the_next_reading(two_ranks, stage):
    for result in two_ranks.run(invariant_cases.ranks_disagree, stage, FUSED):
        assert result["error"].startswith("RuntimeError: ranks disagree on the active block")
        assert result["changed"] == []


@pytest.mark.parametrize(("stage", "steps"), [(0, 2), (1, 3), (2, 2), (3, 3)])
def test_a_block_without_any_gradient_is_left_as_it_is_and_raises_a_step_later(two_ranks, stage, steps):
    for result in two_ranks.run(invariant_cases.branch_steps, stage, branches=(2, 2), steps=steps, hift=FUSED):
        assert result["error"].startswith("RuntimeError: block 1 (^layers.1) received no gradient on any rank")
        assert result["changed"] == ["0"]
        assert result["counts"] == [1, 0, 0]
