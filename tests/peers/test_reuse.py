"""A model outlives its engine: whatever trains it next finds it as it was found, or takes it over whole."""

from __future__ import annotations

import pytest
from hift_testing import peer_cases_reuse as cases
from hift_testing.peer_cases import BOUNDS, is_clear, on

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)
WHOLE = (0, 1, 2)  # stages at which weights stay ordinary tensors


def trains_like_a_fresh_one(results, dtype):
    for found in results:
        assert not found["error"] and not found["unmoved"], found
        assert found["distance"] <= BOUNDS[dtype], found


@pytest.fixture(params=("one_rank", "two_ranks"))
def ranks(request):
    """Both pools in turn."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("destroy", (False, True), ids=("living", "destroyed"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_second_engine_trains_the_module_as_a_fresh_one(ranks, stage, destroy):
    results = on(ranks, cases.engine_after_engine, stage, "fp32", destroy)
    trains_like_a_fresh_one(results, "fp32")
    for found in results:
        for error in found["old"]:
            assert error.startswith("RuntimeError") and is_clear(error), found["old"]


@pytest.mark.slow
@pytest.mark.parametrize("destroy", (False, True), ids=("living", "destroyed"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_second_engine_in_bf16_trains_the_module_as_a_fresh_one(ranks, stage, destroy):
    trains_like_a_fresh_one(on(ranks, cases.engine_after_engine, stage, "bf16", destroy), "bf16")


@pytest.mark.parametrize("stage", STAGES)
def test_a_plain_engine_after_destroy_trains_the_module_as_a_fresh_one(ranks, stage):
    trains_like_a_fresh_one(on(ranks, cases.engine_after_engine, stage, "fp32", True, second="plain"), "fp32")


@pytest.mark.parametrize("stage", STAGES)
def test_hift_after_a_destroyed_plain_engine_trains_the_module_as_a_fresh_one(ranks, stage):
    trains_like_a_fresh_one(on(ranks, cases.engine_after_engine, stage, "fp32", True, first="plain"), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_plain_after_plain_is_the_reference(ranks, stage):
    trains_like_a_fresh_one(on(ranks, cases.engine_after_engine, stage, "fp32", True, "plain", "plain"), "fp32")


@pytest.mark.parametrize("stage", STAGES)
def test_a_replaced_engine_refuses_and_disturbs_nothing(ranks, stage):
    for found in on(ranks, cases.old_engine_leaves_the_new_one_alone, stage, "fp32"):
        assert all(error.startswith("RuntimeError") and is_clear(error) for error in found["errors"]), found["errors"]
        assert found["distance"] <= BOUNDS["fp32"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_after_a_backward_that_failed_trains_as_a_fresh_one(ranks, stage):
    trains_like_a_fresh_one(on(ranks, cases.out_of_memory_then_again, stage, "fp32"), "fp32")


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", WHOLE)
def test_destroy_leaves_the_module_as_it_was_found(ranks, stage, dtype):
    for found in on(ranks, cases.destroyed, stage, dtype):
        assert not found["left"], found["left"]
        assert found["unmoved"] == ["head.bias"]
        assert found["distance"] <= BOUNDS[dtype]


@pytest.mark.parametrize("destroy", (False, True), ids=("living", "destroyed"))
@pytest.mark.parametrize("stage", WHOLE)
def test_a_deep_copy_of_the_module_has_the_users_flags_and_trains_alone(ranks, stage, destroy):
    for found in on(ranks, cases.deep_copy, stage, "fp32", destroy):
        assert found["flags"]
        assert found["unmoved"] == ["head.bias"]
        assert found["distance"] <= BOUNDS["fp32"]
        assert found["engine"] <= BOUNDS["fp32"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_refused_initialize_leaves_the_module_as_it_was_found(ranks, stage):
    results = on(ranks, cases.refused_initialize, stage, "fp32")
    for found in results:
        for name, facts in found.items():
            assert is_clear(facts["error"]), (name, facts["error"])
            assert not facts["left"], (name, facts["left"])
            trains_like_a_fresh_one([facts["then"]], "fp32")
        assert {n: f["error"] for n, f in found.items()} == {n: f["error"] for n, f in results[0].items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_refused_initialize_does_not_disturb_the_engine_that_trains_the_module(ranks, stage):
    for found in on(ranks, cases.refused_beside_a_living_engine, stage, "fp32"):
        assert all(found["errors"].values()), found["errors"]
        assert not found["error"], (found["after"], found["error"])
        assert found["distance"] <= BOUNDS["fp32"], found["after"]


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_destroyed_engine_leaves_no_state_in_memory(ranks, stage, dtype):
    for found in on(ranks, cases.memory_after_destroy, stage, dtype):
        weights = 4 if dtype == "fp32" else 2
        assert found["within"] > found["after"] + 3, "the count must see an engine's state"
        assert found["after"] < weights + 0.5, found  # bytes a parameter: the module's own
        assert found["without the module"] < 0.5, found


@pytest.mark.parametrize("other", ("hift", "plain"))
@pytest.mark.parametrize("stage", STAGES)
def test_two_engines_of_one_process_train_as_each_alone(ranks, stage, other):
    for found in on(ranks, cases.two_engines_in_turn, stage, "fp32", other):
        assert not found["unmoved"]
        assert found["first"] <= BOUNDS["fp32"]
        assert found["second"] <= BOUNDS["fp32"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_initialize_that_fails_after_all_checks_leaves_flags_and_hooks_as_found(ranks, stage):
    for found in on(ranks, cases.fails_in_the_build, stage):
        assert "no optimizer today" in found["error"]
        assert found["left"] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_refused_initialize_within_a_window_leaves_its_gradients_and_what_is_frozen(ranks, stage, tmp_path):
    for found in on(ranks, cases.refused_within_a_window, stage, str(tmp_path)):
        assert "hift.order" in found["refused"]
        assert found["distance"] <= BOUNDS["fp32"]
        assert not any(found["flags"]) and found["loaded"] == 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_an_ended_engine_refuses_everything_and_writes_over_no_checkpoint(ranks, stage, tmp_path):
    for found in on(ranks, cases.ended, stage, str(tmp_path)):
        assert all(error.startswith("RuntimeError: this engine has ended") for error in found["errors"].values()), found
        assert (found["kept"], found["flags"], found["goes on"]) == (True, True, "")


@pytest.mark.parametrize("stage", STAGES[:3])
def test_a_backward_that_the_engine_has_not_begun_is_warned_of_once(one_rank, stage):
    (read,) = on(one_rank, cases.backward_without_the_engine, stage)
    assert len(read) == 1 and "end the engine with engine.destroy()" in read[0]


@pytest.mark.parametrize("stage", (0, 3))
def test_after_a_forward_under_inference_mode_an_engine_saves_loads_and_ends_as_ever(ranks, stage, tmp_path):
    for found in on(ranks, cases.after_inference, stage, str(tmp_path)):
        assert "hift.order" in found.pop("refused")
        assert not any(found.values()), found
