"""Nothing proportional to the whole model is on the device but its weights: counted tensor by tensor.

The model has twelve equal blocks. Bounds are sums of named terms in bytes, all of the active block, a bucket, a tile or
one parameter; the test holds that they stay far below the whole model, so that one whole-model tensor would not fit.
"""

from __future__ import annotations

import pytest
from hift_testing import memory_cases as cases
from hift_testing.selection import slow

pytestmark = pytest.mark.multi_rank

TINY = 4096  # activations' gradients, and DeepSpeed's scalars
FACTORED = 2 * (64 + 256) + 64 + 256  # rows and columns of a layer's two matrices, and its biases: 1-D stay whole
ALWAYS = {"always_active": ["layers.0.2.weight"]}
RUNS = [
    *((stage, "fp32", {}) for stage in range(4)),
    *(slow(stage, "bf16", {}) for stage in range(4)),
    *((stage, "bf16", {"accumulation": 2}) for stage in (1, 2)),
    *((stage, "bf16", {"hift": ALWAYS}) for stage in (1, 3)),
    (3, "bf16", {"start": "fp32"}),
    (2, "bf16", {"hift": {"kernel": "triton"}}),
]


def bounds(
    stage: int, world: int, dtype: str, accumulation: int, facts: dict, fused: bool = False, factored: bool = False
) -> dict[str, float]:
    """Bytes over the model weights (for `backward`: over weights and activations) that each phase may reach."""
    element = 4 if dtype == "fp32" else 2
    gradient = 4 if accumulation > 1 else element  # fp32 between micro steps
    shard, block, parameter = facts["shard"], facts["block"], facts["parameter"]
    bucket = facts["bucket"] * element
    held_by_gloo = 2 * bucket if world > 1 else 0  # its threads free a collective's tensors up to 10 ms later
    tile = not fused and 4 * cases.RING_BYTES // 3 // (8 if dtype == "fp32" else 12)  # of the gradient in fp32
    packed = bucket + (bucket / world if stage > 0 else 0)  # sent, and received
    if world == 1:
        backward = shard * gradient + parameter * element
    elif stage < 2:
        backward = block * gradient + shard * gradient + packed
    else:  # gradients wait until their bucket is full; the next parameter's may be there too
        backward = shard * gradient + bucket + parameter * element + packed
    if stage == 3:  # what DeepSpeed may gather (stage3_max_live_parameters), and a second bucket on its way
        backward += 2 * cases.BUCKET * element + packed
    gathered = 2 * bucket if world > 1 and stage in (1, 2) else 0  # a bucket of new weights, and the one before
    # the first parameter in the engine's dtype beside the given one; its ZeRO-3 partition beside the whole
    init = parameter * element * (facts["given"] > facts["weights"] or stage == 3)
    if stage == 3:  # it broadcasts each parameter first, on one rank too, and gloo may still hold the one before
        init += parameter * element
    kept = facts["always"] + facts["ring"]
    moving = facts["always"] + cases.RING_BYTES if factored else kept  # factored moments come beside the ring
    return {
        "init": facts["given"] + kept + init + TINY,
        "idle": facts["weights"] + kept + TINY,
        "backward": backward + held_by_gloo + TINY,
        "step": moving + shard * element + max(shard * gradient + tile, gathered) + held_by_gloo + TINY,
        "after": kept + TINY,
    }


def assert_within_bounds(stage: int, world: int, dtype: str, keywords: dict, results: list[dict]) -> None:
    for facts in results:
        fused = keywords.get("hift", {}).get("kernel") == "triton"
        allowed = bounds(stage, world, dtype, keywords.get("accumulation", 1), facts, fused, "rule" in keywords)
        assert {phase: facts[phase] for phase in allowed if facts[phase] > allowed[phase]} == {}, (facts, allowed)
        if "hift" not in keywords:
            whole = facts["given"] / (2 if "start" in keywords else 1)
            assert max(allowed["backward"], allowed["step"]) < whole / 2
        parts = world if stage > 0 else 1
        assert 0 < facts["ring"] <= cases.RING_BYTES
        if "rule" in keywords:
            per_element, factored = 4, cases.LAYERS * 4 * FACTORED  # the master
        else:
            per_element, factored = (8 if dtype == "fp32" else 12), 0  # moments, and the master of bf16 weights
        assert facts["host"] == cases.LAYERS * 33088 / parts * per_element + factored - facts["always"]


@pytest.mark.parametrize(("stage", "dtype", "keywords"), RUNS)
def test_device_holds_weights_and_one_blocks_share_on_two_ranks(two_ranks, stage, dtype, keywords):
    results = two_ranks.run(cases.measured, stage, dtype, **keywords)
    assert_within_bounds(stage, 2, dtype, keywords, results)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (2, "fp32"), (3, "bf16")])
def test_device_holds_weights_and_one_block_on_one_rank(one_rank, stage, dtype):
    assert_within_bounds(stage, 1, dtype, {}, one_rank.run(cases.measured, stage, dtype))


def test_ring_bytes_hold_adafactor_s_factored_moments_too(one_rank):
    keywords = {"hift": {"kernel": "triton"}, "rule": {"type": "Adafactor", "params": {}}}
    assert_within_bounds(0, 1, "bf16", keywords, one_rank.run(cases.measured, 0, "bf16", **keywords))


@pytest.mark.parametrize(
    ("stage", "dtype", "hift", "rule"),
    [
        (0, "bf16", {}, None),
        (1, "fp32", {"always_active": ["layers.0.mlp.down_proj"]}, None),
        (2, "bf16", {}, {"type": "Adafactor", "params": {"lr": 1e-2}}),
        (3, "bf16", {"inactive_state": "reset", "steps_per_block": 2, "layers_per_block": 3}, None),
        slow(3, "fp32", {}, {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}}),
    ],
)
def test_state_that_streams_in_small_tiles_and_late_copies_trains_bitwise_the_same(two_ranks, stage, dtype, hift, rule):
    for together, apart, late in two_ranks.run(cases.same_training, stage, dtype, hift, rule):
        assert together == apart == late


def test_state_that_begins_anew_is_filled_in_the_ring_and_the_host_does_not_wait(two_ranks):
    for facts in two_ranks.run(cases.reset_run, 2, "bf16"):
        assert facts["settled"] == 0
        assert facts["filled"] == facts["tiles"] > 0


def test_a_turn_that_begins_without_a_gradient_leaves_fresh_state_on_the_host_too(two_ranks):
    for together, apart in two_ranks.run(cases.skipped_reset, 2, "bf16"):
        assert together == apart
        assert len(set(together)) == 5


def test_moments_that_are_loaded_after_a_failed_update_of_fresh_state_stay(two_ranks, tmp_path):
    for gone_on, loaded in two_ranks.run(cases.failed_reset, str(tmp_path), 2, "bf16"):
        assert gone_on == loaded


@pytest.mark.parametrize("tenth", [8_000, 40_000, 10**6])
def test_engine_and_plan_make_the_same_ring_for_a_card(two_ranks, tenth):
    for ring, planned, block in two_ranks.run(cases.same_ring, 2, "bf16", 10 * tenth, RING_BYTES=5_000):
        assert ring == planned
        assert 0.7 * min(tenth, block) <= ring <= min(tenth, 1.1 * block)


@pytest.mark.parametrize(
    ("stage", "dtype", "hift"),
    [
        (2, "bf16", {}),
        slow(3, "bf16", {"inactive_state": "reset", "steps_per_block": 2}),
        slow(1, "fp32", {}),
    ],
)
def test_a_checkpoint_of_state_on_its_way_is_whole_and_what_was_loaded_ahead_is_forgotten(
    two_ranks, tmp_path, stage, dtype, hift
):
    for together, late in two_ranks.run(cases.same_resumption, str(tmp_path), stage, dtype, hift):
        assert together == late
        assert late[0] == late[1] == late[2] != late[3]


@pytest.mark.parametrize(
    ("stage", "hift"), [(1, {}), (3, {"order": "top2down"}), (2, {"steps_per_block": 2, "order": "random"})]
)
def test_the_coming_block_s_first_tiles_are_on_their_way_after_each_step(two_ranks, stage, hift):
    for facts in two_ranks.run(cases.loaded_ahead, stage, hift):
        assert facts == {"right": [True] * 7, "full": [True] * 7, "forgotten": [True]}
