"""Blocks that a batch does not reach: skipped where the user says so, refused by name where not, never a hang."""

from __future__ import annotations

import pytest
from hift_testing import peer_cases_unreached as cases
from hift_testing.peer_cases import BOUNDS, is_clear, on

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)


@pytest.fixture(params=("one_rank", "two_ranks"))
def ranks(request):
    """Both pools in turn."""
    return request.getfixturevalue(request.param)


def passed_over(results, dtype):
    for rank, found in enumerate(results):
        assert not found["error"], found["error"]
        assert found["missed"], "the case must miss a block"
        assert found["distance"] <= BOUNDS[dtype], found
        assert not found["changed unreached"], found["changed unreached"]
        assert found["turns"] == found["expected turns"]
        assert not found["unnamed"], found["summary"]
        for count in found["missed"].values():
            assert str(count) in found["summary"]
        assert len(found["warnings"]) <= found["cycles"], found["warnings"]
        assert found["warnings"] if rank == 0 else True, "rank 0 is told"


@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [name for name in cases.MODELS if name != "mixed by rank"])
def test_a_turn_without_gradients_passes_and_is_reported(ranks, name, stage, gas):
    if gas == 1:
        passed_over(on(ranks, cases.skipped_turns, name, stage), "fp32")
    else:
        passed_over(on(ranks, cases.skipped_turns, name, stage, gas=gas), "fp32")


@pytest.mark.parametrize("stage", (0, 1, 2))
def test_a_turn_passes_only_if_no_rank_has_gradients(two_ranks, stage):
    passed_over(on(two_ranks, cases.skipped_turns, "mixed by rank", stage), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [name for name in cases.MODELS if name != "mixed by rank"])
def test_a_turn_without_gradients_passes_in_bf16(ranks, name, stage):
    passed_over(on(ranks, cases.skipped_turns, name, stage, "bf16"), "bf16")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ("layer drop", "text only", "experts"))
def test_by_default_a_block_without_gradients_is_an_error_that_names_it(ranks, name, stage):
    results = on(ranks, cases.refused_turn, name, stage)
    for found in results:
        assert found["error"].startswith("RuntimeError") and is_clear(found["error"]), found
        assert found["active"] in found["error"] and "no_gradient" in found["error"], found
        assert not found["moved"]
        assert found == results[0]


@pytest.mark.parametrize("clear", (False, True), ids=("go on", "zero_grad first"))
@pytest.mark.parametrize("gas", (1, 2, 3))
@pytest.mark.parametrize("stage", STAGES)
def test_windows_after_a_refused_turn_are_whole(ranks, stage, gas, clear):
    for found in on(ranks, cases.windows_after_a_refused_turn, stage, gas, clear, "all"):
        assert all(found["raised"]) and len(found["raised"]) == 6, found["raised"]
        assert found["steps"] == 8
        assert found["distance"] <= BOUNDS["fp32"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_window_of_which_one_micro_step_reaches_the_block_trains(ranks, stage):
    for found in on(ranks, cases.windows_after_a_refused_turn, stage, 2, False, "first"):
        assert found["distance"] <= BOUNDS["fp32"]


@pytest.mark.parametrize("shared_way", (False, True), ids=("nothing to train", "something to train"))
@pytest.mark.parametrize("torch_style", (False, True), ids=("engine.backward", "loss.backward"))
@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", (0, 1, 2))
def test_a_rank_whose_loss_misses_the_block_takes_part_with_zeros(two_ranks, stage, gas, torch_style, shared_way):
    for found in on(two_ranks, cases.one_rank_misses, stage, torch_style, gas, shared_way):
        assert not found["error"], found["error"]
        assert found["distance"] <= BOUNDS["fp32"]
