"""What people do between steps changes nothing, and what HiFT cannot train is refused with a sentence."""

from __future__ import annotations

import pytest
from hift_testing import peer_cases_states as cases
from hift_testing.peer_cases import on
from hift_testing.selection import slow

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)


# At stage 3 `make test` generates under inference mode (test_zero3.py).
@pytest.mark.parametrize("stage", (0, 1, 2, slow(3)))
def test_generation_between_steps_changes_nothing(two_ranks, stage):
    assert on(two_ranks, cases.generating, stage) == [0.0, 0.0]


def test_the_consolidated_weights_of_stage_3_have_every_trained_parameter(two_ranks):
    first, second = on(two_ranks, cases.consolidated)
    assert first and all(first.values())
    assert second == {}


@pytest.mark.parametrize("hift", [{}, cases.RESIDENT], ids=["streaming", "resident"])
@pytest.mark.parametrize("stage", STAGES)
def test_states_that_went_to_the_host_and_back_train_bitwise_as_if_they_had_stayed(two_ranks, stage, hift):
    for found in on(two_ranks, cases.offloading, stage, "bf16", hift):
        assert found["difference"] == 0.0
        assert "call engine.reload_states() first" in found["error"]


@pytest.mark.parametrize("stage", (slow(0), slow(1), 2, 3))
def test_offloaded_states_are_never_read_and_come_back_with_what_the_user_wrote(two_ranks, tmp_path, stage):
    for found in on(two_ranks, cases.while_offloaded, stage, str(tmp_path)):
        sentence = "RuntimeError: states are offloaded (engine.offload_states): call engine.reload_states() first"
        assert dict.fromkeys(found["errors"], sentence) == found["errors"]
        assert (found["same"], found["manifest kept"], found["bytes left"]) == (True, True, 0)
        assert (found["difference"], found["after destroy"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("stage", "kind", "sentence"),
    [
        *((stage, "complex", "ValueError: phases: a complex parameter") for stage in STAGES),
        *((stage, "sparse", "ValueError: embed: an embedding with sparse=True") for stage in STAGES),
        *((stage, "zero.Init", "is a ZeRO-3 parameter") for stage in STAGES[:3]),
        (1, "nothing", ""),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(one_rank, stage, kind, sentence):
    error = on(one_rank, cases.refused, stage, kind)[0]
    assert sentence in error
    assert bool(sentence) == bool(error)


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_without_gradients_in_two_whole_turns_is_an_error_that_names_it(two_ranks, stage):
    for found in on(two_ranks, cases.half_a_layer_reentrant, stage, "error"):
        assert found["steps"] == 2
        assert found["error"].startswith("RuntimeError: 0.inside.weight, 0.inside.bias received no gradient on any")


@pytest.mark.parametrize("stage", (0, 3))
def test_with_skip_such_a_parameter_is_named_in_one_warning(two_ranks, stage):
    for found in on(two_ranks, cases.half_a_layer_reentrant, stage, "skip"):
        assert (found["steps"], found["error"]) == (8, "")
        assert [text.partition(" received")[0] for text in found["warnings"]] == [
            "0.inside.weight, 0.inside.bias", "1.inside.weight, 1.inside.bias"
        ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_deepspeeds_optimizer_and_engine_offer_has_the_same_type(one_rank, stage, dtype):
    plain, ours = on(one_rank, cases.types, stage, dtype)[0]
    if stage == 0:
        plain["keys"] = ours["keys"]
        if dtype == "fp32":  # where DeepSpeed has no norm
            plain["norm"] = "float"
    if "get_lr" not in plain:  # stage 0 in fp32 is the bare torch optimizer
        plain["lr of groups"] = ours["lr of groups"]
    del plain["engine.optimizer_name"]  # "adamw" from our config; DeepSpeed's is here a client's optimizer
    assert plain.items() <= ours.items()
    assert ours["lr of groups"] == "[0.25]"
