"""Ideas of DeepSpeed's own unit tests, through our engine."""

from __future__ import annotations

import pytest
from hift_testing import peer_cases_deepspeed as cases
from hift_testing.peer_cases import BOUNDS, on

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)


@pytest.fixture(params=("one_rank", "two_ranks"))
def ranks(request):
    """Both pools in turn."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", (1, 2, 3))
def test_masters_and_moments_of_all_parameters_are_read_and_written(ranks, stage, dtype):
    for found in on(ranks, cases.full_parameters, stage, dtype):
        assert not found["wrong"], found["wrong"]
        assert found["distance"] <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(two_ranks, stage, dtype, tmp_path):
    for found in on(two_ranks, cases.saved_and_loaded, stage, dtype, str(tmp_path), 2):
        assert found["difference"] == 0.0


@pytest.mark.parametrize("torch_style", (False, True), ids=("engine.backward", "loss.backward"))
@pytest.mark.parametrize("kind", ("dict", "tuple", "namedtuple", "ModelOutput"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_in_any_container_trains(two_ranks, stage, kind, torch_style):
    for found in on(two_ranks, cases.outputs, stage, kind, torch_style):
        assert found["rotating"] <= BOUNDS["fp32"], found


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_the_caller_divides_is_not_divided_again(ranks, stage):
    for found in on(ranks, cases.scaled_loss, stage):
        assert found["distance"] <= BOUNDS["fp32"]


@pytest.mark.parametrize("stage", STAGES)
def test_what_users_read_of_an_engine_has_plain_deepspeeds_types(ranks, stage):
    for found in on(ranks, cases.plain_optimizer_state, stage):
        if stage == 0:  # where DeepSpeed has no norm in fp32
            found["plain"]["norm"] = "float"
        assert found["hift"] == found["plain"]
