"""What users do with a ZeRO-3 engine between steps: hooks off and on, generation, whole weights, caches."""

from __future__ import annotations

import pytest
from hift_testing import peer_cases_stage3 as cases
from hift_testing.peer_cases import BOUNDS, ONE_BLOCK, on

pytestmark = pytest.mark.multi_rank

FORWARD = {"fp32": 1e-5, "bf16": 0.05}  # a few roundings of values of size 1, after weights within BOUNDS


@pytest.fixture(params=("one_rank", "two_ranks"))
def ranks(request):
    """Both pools in turn."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("where", ("first", "every", "within"))
@pytest.mark.parametrize("how", ("deepspeed", "trl"))
def test_hooks_come_off_and_on_and_training_goes_on(ranks, how, where, dtype):
    for found in on(ranks, cases.unwrapped, 3, dtype, how, where):
        assert found["forward"] <= FORWARD[dtype]
        assert found["distance"] <= BOUNDS[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("where", ("first", "every", "within"))
@pytest.mark.parametrize("how", ("deepspeed", "trl"))
def test_hooks_of_plain_deepspeed_come_off_and_on(ranks, how, where):
    for found in on(ranks, cases.unwrapped, 3, "fp32", how, where, plain=True):
        assert found["distance"] <= BOUNDS["fp32"]


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_consolidated_weights_hold_every_trained_parameter_whichever_block_is_active(ranks, dtype):
    found = on(ranks, cases.consolidated, dtype, 4)[0]
    frozen = {"head.bias", "layers.1.linear.bias"}
    assert found["without"] == [[name for name in found["names"] if name not in frozen]] * 4
    assert found["with"] == [found["names"]] * 4
    assert not found["wrong"]
    assert found["after"]


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_forward_under_inference_mode_changes_nothing(ranks, stage, dtype):
    for found in on(ranks, cases.inference_of_a_stack, stage, dtype):
        assert found["forward"] <= FORWARD[dtype]
        assert found["distance"] <= BOUNDS[dtype]


@pytest.mark.parametrize(("family", "hift"), (("llama", {}), ("qwen2", {}), ("llama", ONE_BLOCK)))
@pytest.mark.parametrize("stage", (2, 3))
def test_generation_under_inference_mode_changes_nothing(two_ranks, stage, family, hift):
    for found in on(two_ranks, cases.inference_between_steps, stage, "bf16", family, hift):
        assert found["difference"] == 0.0


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_an_emptied_partition_cache_holds_nothing_and_training_goes_on(ranks, dtype):
    for found in on(ranks, cases.emptied, dtype):
        assert found["gathered"] == 0
        assert found["distance"] <= BOUNDS[dtype]


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_layer_that_is_called_twice_trains(ranks, stage):
    for found in on(ranks, cases.called_twice, stage, "fp32"):
        assert found["distance"] <= BOUNDS["fp32"]
