"""Gradients that the user has dropped, or asked for other ends, are in no update."""

from __future__ import annotations

import pytest
from hift_testing import peer_cases_dropped as cases
from hift_testing.peer_cases import BOUNDS, ONE_BLOCK, faults, on

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)


@pytest.fixture(params=("one_rank", "two_ranks"))
def ranks(request):
    """Both pools in turn."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("by", ("engine", "optimizer", "client", "module"))
@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_drops_what_was_computed(ranks, stage, gas, by):
    for found in on(ranks, cases.dropped, "bad_batch_first", by, stage, gas=gas):
        assert not faults(found)


@pytest.mark.slow
@pytest.mark.parametrize("by", ("engine", "optimizer", "client"))
@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [name for name in cases.SCRIPTS if name != "bad_batch_first"])
def test_zero_grad_drops_what_was_computed_and_nothing_else(ranks, name, stage, gas, by):
    for found in on(ranks, cases.dropped, name, by, stage, gas=gas):
        assert not faults(found)


@pytest.mark.slow
@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_drops_what_was_computed_in_bf16(ranks, stage, gas):
    for found in on(ranks, cases.dropped, "bad_batch_first", "engine", stage, "bf16", gas):
        assert not faults(found, "bf16")


@pytest.mark.parametrize("hift", ({}, ONE_BLOCK), ids=("rotating", "one block"))
@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_that_failed_leaves_nothing_behind(ranks, stage, gas, hift):
    for found in on(ranks, cases.failing_backwards, stage, 1, hift, gas):
        assert any("out of memory" in error for error in found["raised"]), "the case must fail as planned"
        assert not found["error"], found["error"]
        assert found["distance"] <= BOUNDS["fp32"]


@pytest.mark.parametrize("zeroes", (False, True), ids=("goes on", "zero_grad"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_that_failed_ends_its_window_and_the_next_one_is_whole(ranks, stage, zeroes):
    for found in on(ranks, cases.failing_second_micro_step, stage, zeroes):
        assert all("out of memory" in error for error in found["raised"]), "the case must fail as planned"
        assert not found["error"], found["error"]
        assert found["distance"] <= BOUNDS["fp32"]


@pytest.mark.parametrize("zeroes", (False, True), ids=("goes on", "zero_grad"))
@pytest.mark.parametrize("stage", (0, 1))
def test_a_rank_whose_backward_failed_and_that_steps_stays_in_step_with_the_others(two_ranks, stage, zeroes):
    first, second = on(two_ranks, cases.one_rank_fails, stage, zeroes)
    assert "out of memory" in first.pop("raised") and not second.pop("raised")
    assert first == second
    assert (first["steps"], first["unmoved"]) == (3, [])


@pytest.mark.parametrize("torch_style", (False, True), ids=("engine.backward", "loss.backward"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_after_a_backward_that_failed_is_an_error_and_no_half_update(ranks, stage, torch_style):
    for found in on(ranks, cases.step_after_a_failed_backward, stage, torch_style):
        assert "out of memory" in found["raised"]
        assert found["error"].startswith("RuntimeError: the last backward ended with an error")
        assert found["unchanged"]
        assert found["distance"] <= BOUNDS["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("where", (0, 2))
@pytest.mark.parametrize("stage", (1, 2, 3))
def test_a_torch_style_backward_that_failed_leaves_nothing_behind(ranks, stage, where):
    for found in on(ranks, cases.failing_backwards, stage, where, {}, torch_style=True):
        assert any("out of memory" in error for error in found["raised"]), "the case must fail as planned"
        assert not found["error"], found["error"]
        assert found["distance"] <= BOUNDS["fp32"]


@pytest.mark.parametrize("torch_style", (False, True), ids=("engine.backward", "loss.backward"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_for_the_inputs_is_not_in_the_update(ranks, stage, torch_style):
    for found in on(ranks, cases.fgsm, stage, torch_style):
        assert not faults(found)


@pytest.mark.parametrize("toggle", (False, True), ids=("left on", "switched off"))
@pytest.mark.parametrize("hift", ({}, ONE_BLOCK), ids=("rotating", "one block"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_gan_of_two_engines_trains_both_as_the_oracle(ranks, stage, hift, toggle):
    for found in on(ranks, cases.gan, stage, toggle, True, hift):
        assert not found["error"], found["error"]
        assert found["generator"] <= BOUNDS["fp32"], found
        assert found["discriminator"] <= BOUNDS["fp32"], found


@pytest.mark.parametrize(
    ("dtype", "hift"),
    [("fp32", {}), ("bf16", {}), ("bf16", {"kernel": "triton", "state": {"master": "split16"}})],
    ids=("fp32", "bf16", "split16"),
)
@pytest.mark.parametrize("stage", (0, 2, 3))
def test_a_step_out_of_memory_has_changed_nothing_or_says_that_it_has(ranks, stage, dtype, hift):
    for found in on(ranks, cases.out_of_memory_in_step, stage, dtype, hift):
        assert not found["wrong"], found
        assert found["right"] >= 2, found


def test_a_load_mends_what_an_update_that_ended_half_way_has_left(two_ranks, tmp_path):
    for found in on(two_ranks, cases.torn_and_loaded, str(tmp_path)):
        assert all("ended with an error half way" in error for error in found["refused"]), found
        assert found["distance"] <= BOUNDS["bf16"]


@pytest.mark.parametrize("hift", ({}, {"always_active": ["head"]}), ids=("", "always active"))
@pytest.mark.parametrize(("stage", "dtype"), ((0, "bf16"), (2, "fp32"), (3, "bf16")))
def test_a_failed_step_after_which_training_goes_on_has_changed_no_bit(ranks, stage, dtype, hift):
    assert not any(on(ranks, cases.changed_by_a_failed_step, stage, dtype, hift))
