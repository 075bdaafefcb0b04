"""Families of Hugging Face models on ZeRO-2 and ZeRO-3: every block trains, and as in plain torch."""


import pytest
from hift_testing import tolerances
from hift_testing.parity import agree
from hift_testing.selection import diagonal

pytestmark = pytest.mark.multi_rank

# family -> blocks. Tied or not, with experts, encoder-decoder, a classifier head, pixels.
FAMILIES = {"gpt2": 4, "opt": 4, "mixtral": 5, "t5": 7, "bert": 5, "vit": 5}
LAYER_NORM = ("gpt2", "opt", "vit")  # see tolerances.STAGE3
MOE_LEAF = {"zero_optimization": {"leaf_module": {"classes": ["hift_testing.parity.Experts"]}}}
EXPERT_BLOCKS = {"blocks": [["embed", "head"], ["widen", "narrow"], ["experts.0"], ["experts.1", "experts.2"]]}


def one_rotation(pool, stage, hift, blocks, **kwargs):
    agree(pool, stage, "fp32", hift, 1, 0.0, 1, blocks=blocks, timeout_s=40, **kwargs)


@pytest.mark.parametrize(("family", "stage"), diagonal(tuple(FAMILIES), (2, 3), 1))
def test_one_rotation_of_a_family_equals_plain_torch(two_ranks, stage, family):
    weights = tolerances.EXACT if family in LAYER_NORM else None
    one_rotation(two_ranks, stage, {}, FAMILIES[family], weights=weights, family=family)


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_an_expert_that_one_rank_does_not_use_counts_as_zero(two_ranks, stage):
    one_rotation(two_ranks, stage, {}, 4, weights=tolerances.EXACT, family="moe", extra=MOE_LEAF)


# Not at stage 3, as in DeepSpeed: a rank that runs no backward takes no part in the gathers of the others' backward.
@pytest.mark.parametrize("stage", (0, 1, 2))
def test_a_block_that_one_rank_s_loss_does_not_reach_counts_as_zero(two_ranks, stage):
    one_rotation(two_ranks, stage, EXPERT_BLOCKS, 4, family="moe")
