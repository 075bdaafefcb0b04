"""HiFT on ZeRO 0-3 against HiFT in plain torch, one process (`ReferenceHiFT`), over two rotations."""

import itertools

import pytest
import torch
from deepspeed import comm as dist
from hift_testing import tolerances
from hift_testing.parity import agree, share_that_differs
from hift_testing.selection import diagonal, newer_keys, slow
from hift_testing.training import ds_config, engine_of, run_steps, whole_weights

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)
DTYPES = ("fp32", "bf16")
# One stage with optimizer state on each rank and whole weights, and the one that shards weights, too.
SHARDED = (slow(0), 1, slow(2), 3)
SMALL_BUCKETS = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}  # about 12 buckets for each layer


def combinations():
    """All of stage, dtype, order and size of blocks. Of these `make test` takes six, in which each value of each is
    met; `make slow` runs the rest."""
    orders, sizes = ("bottom2up", "top2down", "random"), ((1, 6), (2, 3), (4, 2))
    for stage, dtype, order, size in itertools.product(STAGES, range(2), range(3), range(3)):
        taken = (dtype, size) == ((stage + order) % 2, (stage + order) % 3) and (stage + order) % 4 < 2
        values = (stage, DTYPES[dtype], orders[order], *sizes[size])
        yield values if taken else slow(*values)


@pytest.mark.parametrize(("stage", "dtype", "order", "layers_per_block", "blocks"), combinations())
def test_two_rotations_equal_plain_torch(two_ranks, stage, dtype, order, layers_per_block, blocks):
    agree(two_ranks, stage, dtype, {"order": order, "layers_per_block": layers_per_block}, blocks=blocks)


# Two blocks of three units from here on: the smallest rotation in which state is kept between turns.
PAIR = {"layers_per_block": 3}


@pytest.mark.parametrize(("stage", "dtype"), diagonal(STAGES, DTYPES))
def test_accumulation_sums_micro_steps_like_plain_torch(two_ranks, stage, dtype):
    agree(two_ranks, stage, dtype, PAIR, 2)


@pytest.mark.parametrize(("stage", "dtype"), diagonal(STAGES, DTYPES, 1))
def test_accumulation_and_clipping_stay_within_the_norm_s_rounding(two_ranks, stage, dtype):
    share = tolerances.CLIPPED_BF16_SHARE if dtype == "bf16" else None
    weights = tolerances.CLIPPED_STAGE3 if stage == 3 else tolerances.CLIPPED
    agree(two_ranks, stage, dtype, PAIR, 2, 0.5, weights=weights, share=share)


def effect_of_clipping(stage, clip):
    """How a clipped run differs from an unclipped one, all of whose norms are clipped. Collective."""
    weights = []
    for bound in (clip, 0.0):
        engine = engine_of(ds_config(stage, "fp32", {"layers_per_block": 3}, gradient_clipping=bound))
        for step in range(4):
            run_steps(engine, 1, start=step)
            assert engine.get_global_grad_norm() > clip
        weights.append(whole_weights(engine))
    assert share_that_differs(*weights) > 0.2


@pytest.mark.parametrize("stage", (slow(0), 1, slow(2), slow(3)))
def test_a_bound_that_clips_changes_the_run(two_ranks, stage):
    """The test above could not see clipping that does nothing on both sides."""
    two_ranks.run(effect_of_clipping, stage, 0.5)


@pytest.mark.parametrize("stage", SHARDED)
def test_a_turn_of_two_steps_keeps_its_block(two_ranks, stage):
    agree(two_ranks, stage, "fp32", {**PAIR, "steps_per_block": 2})


@pytest.mark.parametrize("stage", (slow(0), slow(1), 2, 3))
def test_reset_state_is_fresh_at_each_turn(two_ranks, stage):
    hift = {**PAIR, "steps_per_block": 2, "inactive_state": "reset"}
    agree(two_ranks, stage, "fp32", hift, weights=tolerances.STAGE3_RESET if stage == 3 else None)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), slow(1, "fp32"), slow(2, "fp32"), (3, "fp32"), (2, "bf16")])
def test_always_active_norms_train_at_every_step(two_ranks, stage, dtype):
    agree(two_ranks, stage, dtype, {**PAIR, "always_active": ["norm"]})


@pytest.mark.parametrize("stage", SHARDED)
def test_a_tied_head_trains_with_the_embedding(two_ranks, stage):
    agree(two_ranks, stage, "fp32", PAIR, family="llama4_tied")


@pytest.mark.parametrize(("stage", "way"), diagonal(STAGES, ("overlap", "wait"), 1))
def test_small_buckets_change_nothing(two_ranks, stage, way):
    overlap, dtype = (True, "bf16") if way == "overlap" else (False, "fp32")
    agree(two_ranks, stage, dtype, PAIR, 2, extra={"zero_optimization": {**SMALL_BUCKETS, "overlap_comm": overlap}})


AVERAGING = {
    "prescale": ("fp32", {"prescale_gradients": True}, {"predivide": 2.0}),
    # 3 is no power of two: dividing at the wrong place would show.
    "predivide": ("bf16", {"gradient_predivide_factor": 3.0}, {"predivide": 3.0}),
    "sum": ("fp32", {"gradient_allreduce_op": "sum"}, {"mean": False}),
    "communication_fp32": ("bf16", {"communication_data_type": "fp32"}, {"communication_dtype": "fp32"}),
}


def averaging():
    """`make test` takes each key at one stage, of those that reduce whole gradients (0, 1) or shards (2, 3)."""
    taken = {"prescale": (0,), "predivide": (3,), "sum": (2,), "communication_fp32": (1,)}
    for stage, case in itertools.product(STAGES, AVERAGING):
        if (stage, case) != (3, "sum"):  # which DeepSpeed refuses
            marks = [newer_keys] if case == "sum" else []
            yield pytest.param(stage, case, marks=marks if stage in taken[case] else [*marks, pytest.mark.slow])


@pytest.mark.parametrize(("stage", "case"), averaging())
def test_averaging_follows_deepspeed_s_keys(two_ranks, stage, case):
    dtype, extra, reference = AVERAGING[case]
    agree(two_ranks, stage, dtype, PAIR, extra=extra, reference=reference)


@pytest.mark.parametrize(
    ("stage", "accumulation_dtype"),
    [
        (2, "fp32"), (3, "bf16"), slow(0, "fp32"), slow(0, "bf16"), slow(1, "fp32"), slow(1, "bf16"), slow(2, "bf16"),
        slow(3, "fp32"),
    ],
)  # fmt: skip
def test_gradients_accumulate_in_the_dtype_asked_for(two_ranks, stage, accumulation_dtype):
    agree(
        two_ranks, stage, "bf16", PAIR, 3,
        extra={"data_types": {"grad_accum_dtype": accumulation_dtype}},
        reference={"accumulation_dtype": accumulation_dtype},
    )  # fmt: skip


@pytest.mark.parametrize(("stage", "given_as"), diagonal(STAGES, ("model_parameters", "client_optimizer"), 1))
def test_param_groups_keep_their_rate_and_decay(two_ranks, stage, given_as):
    client = given_as == "client_optimizer"
    agree(two_ranks, stage, "bf16" if client else "fp32", PAIR, groups=True, client=client)


@pytest.mark.parametrize("stage", (1, slow(2), 3))
def test_offload_optimizer_is_accepted_and_changes_nothing(two_ranks, stage):
    agree(two_ranks, stage, "fp32", PAIR, extra={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})


@pytest.mark.parametrize("dtype", [slow("fp32"), "bf16"])
def test_offload_param_changes_nothing(two_ranks, dtype):
    agree(two_ranks, 3, dtype, PAIR, extra={"zero_optimization": {"offload_param": {"device": "cpu"}}})


@pytest.mark.parametrize(("dtype", "groups"), [slow("fp32", False), ("bf16", True)])
@pytest.mark.gathers
def test_a_model_built_under_zero_init_trains_alike(two_ranks, dtype, groups):
    agree(two_ranks, 3, dtype, PAIR, zero_init=True, groups=groups)


@pytest.mark.parametrize("stage", SHARDED)
def test_loss_backward_without_the_engine_is_the_same(two_ranks, stage):
    agree(two_ranks, stage, "fp32", PAIR, backward="loss")


@newer_keys
@pytest.mark.parametrize("stage", SHARDED)
def test_unmanaged_accumulation_reduces_at_step(two_ranks, stage):
    # DeepSpeed allows overlap_comm beside unmanaged accumulation at stages 2 and 3 only.
    extra = {"managed_gradient_accumulation": False, "zero_optimization": {"overlap_comm": stage >= 2}}
    agree(two_ranks, stage, "bf16", PAIR, backward="unmanaged", extra=extra)


@pytest.mark.parametrize("stage", (0, 1))
def test_no_sync_keeps_gradients_on_their_rank(two_ranks, stage):
    agree(two_ranks, stage, "fp32", PAIR, backward="no_sync")


@pytest.mark.parametrize(("stage", "dtype"), diagonal(STAGES, DTYPES))
def test_one_rank_equals_plain_torch(one_rank, stage, dtype):
    agree(one_rank, stage, dtype, PAIR, 2)


@pytest.mark.parametrize(("stage", "dtype"), diagonal((0, 1), DTYPES))
def test_no_sync_on_one_rank_accumulates(one_rank, stage, dtype):
    # The engine cannot know of the second backward, so it accumulates in the weights' dtype.
    agree(one_rank, stage, dtype, PAIR, backward="no_sync", reference={"accumulation_dtype": dtype})


@pytest.mark.parametrize("stage", (slow(0), slow(1), slow(2), slow(3)))
def test_four_ranks_equal_plain_torch(four_ranks, stage):
    agree(
        four_ranks, stage, "fp32", PAIR,
        weights=tolerances.FOUR_RANKS_STAGE3 if stage == 3 else tolerances.FOUR_RANKS,
    )  # fmt: skip


def slices_against_zero3(dtype):
    """This rank's slice of every parameter against the one that DeepSpeed's ZeRO-3 made. Collective."""
    engine = engine_of(ds_config(3, dtype, {}))
    whole = whole_weights(engine)
    assert len(whole) == 39
    for state in engine.optimizer.states:
        for index, (param, segment) in enumerate(zip(state.shard.params, state.shard.segments, strict=True)):
            assert segment.start == min(dist.get_rank() * param.ds_tensor.ds_numel, param.ds_numel), segment.fqn
            mine = whole[segment.fqn].view(-1)[segment.start : segment.start + segment.numel]
            assert torch.equal(state.shard.weight_slice(index), mine), segment.fqn


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_are_those_of_zero_3(four_ranks, dtype):
    four_ranks.run(slices_against_zero3, dtype)
