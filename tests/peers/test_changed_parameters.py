"""What users do to parameters after `initialize` is honoured or refused, and never trained wrongly in silence."""

from __future__ import annotations

import re

import pytest
from hift_testing import peer_cases_changes as cases
from hift_testing.peer_cases import BOUNDS, is_clear, on

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)
WHOLE = (0, 1, 2)
LLAMA = [name for name in cases.CHANGES if "tokens" in name]
SMALL = [name for name in cases.CHANGES if name not in LLAMA]


@pytest.fixture(params=("one_rank", "two_ranks"))
def ranks(request):
    """Both pools in turn."""
    return request.getfixturevalue(request.param)


def refused_at_the_next_step(results):
    for found in results:
        assert found["error"].startswith("RuntimeError"), found
        assert re.search(found["words"], found["error"]) and is_clear(found["error"]), found
        assert found["steps"] == 1 and not found["moved"], found
        assert found["error"] == results[0]["error"]
        assert not found["after"] and not found["hooks"], found


@pytest.mark.parametrize("stage", WHOLE)
@pytest.mark.parametrize("name", SMALL)
def test_a_changed_parameter_is_an_error_that_names_it(ranks, name, stage):
    refused_at_the_next_step(on(ranks, cases.changed_module, name, stage))


@pytest.mark.parametrize("name", [name for name in SMALL if "parameter" in name or "module" in name])
def test_a_changed_set_of_parameters_is_an_error_at_stage_3(ranks, name):
    refused_at_the_next_step(on(ranks, cases.changed_module, name, 3))


@pytest.mark.parametrize("stage", WHOLE)
@pytest.mark.parametrize("name", LLAMA)
def test_another_number_of_tokens_is_an_error_that_names_the_embedding(ranks, name, stage):
    refused_at_the_next_step(on(ranks, cases.changed_module, name, stage))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["parameter replaced", "module replaced", "parameter added"])
def test_a_changed_module_is_neither_saved_nor_loaded_into(ranks, name, stage, tmp_path):
    """Its weights and the masters beside them would not belong together, and the next turn would bring the old back."""
    for found in on(ranks, cases.changed_between_checkpoints, name, stage, str(tmp_path)):
        for error in found["errors"].values():
            assert error.startswith("RuntimeError") and re.search(found["words"], error) and is_clear(error), found
        assert not found["moved"] and not found["written"], found


@pytest.mark.parametrize("stage", WHOLE)
def test_weights_in_new_memory_train_on_or_are_refused(ranks, stage):
    for found in on(ranks, cases.new_memory, stage):
        if found["error"]:
            assert is_clear(found["error"]) and "head.weight" in found["error"], found
        else:
            assert found["distance"] <= BOUNDS["fp32"]


@pytest.mark.parametrize("one_block", (False, True), ids=("rotating", "one block"))
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_users_write_into_weights_is_kept_and_trained_on(ranks, stage, dtype, one_block):
    names = ["head.weight", "layers.0.linear.weight", "layers.1.linear.bias"]
    for found in on(ranks, cases.writes, stage, dtype, names, one_block):
        assert found["distance"] <= BOUNDS[dtype]
        assert not found["stale"], "safe_get_full_fp32_param has what was written"


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_from_before_are_in_no_update(ranks, stage, dtype):
    for found in on(ranks, cases.gradients_before, stage, dtype):
        assert found["distance"] == 0.0


@pytest.mark.parametrize("regex", ("^embed", "^head"))
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_on_either_name_freezes_a_tied_tensor(two_ranks, stage, regex):
    for found in on(two_ranks, cases.frozen_tied, stage, regex):
        assert found["unmoved"] == ["embed.weight"]


@pytest.mark.parametrize("stage", STAGES)
def test_switching_a_parameter_of_the_active_block_off_is_warned_of(ranks, stage):
    results = on(ranks, cases.switched_off, stage, "layers.0.linear.weight")
    assert not any(found["error"] for found in results), results
    assert results[0]["warnings"], "rank 0 reads a warning"


@pytest.mark.parametrize("stage", STAGES)
def test_complex_parameters_are_refused(ranks, stage):
    for error in on(ranks, cases.complex_parameter, stage):
        assert error.startswith(("ValueError", "TypeError")) and "filter" in error and is_clear(error), error


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_without_a_gradient_for_two_turns_is_an_error_that_names_it(ranks, stage):
    for found in on(ranks, cases.partly_reentrant, stage):
        first = next((index for index, error in enumerate(found["errors"]) if error), None)
        assert first is not None, "no error in four cycles"
        assert first >= found["blocks"], "one turn without a gradient is not an error yet"
        assert first < 3 * found["blocks"]
        error = found["errors"][first]
        assert error.startswith("RuntimeError") and "layers.0.inside" in error and is_clear(error), error
        assert "outside" not in error


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_that_every_other_turn_reaches_trains(ranks, stage):
    for found in on(ranks, cases.sometimes, stage):
        assert not found["error"], found["error"]
        assert found["distance"] <= BOUNDS["fp32"]
