"""Shards, state, ring, buckets and traffic of one config, against sums by hand, padding included.

Three parameters: `large` of 5000 elements, a block, and `small` of 30 and `norm` of 7, a block; a buffer of 40 bytes. A
slice is ceil(elements / ranks), its slot a multiple of 16; a tile in the ring begins at a multiple of 256 bytes.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hift_ds.config.resolve import resolve
from hift_ds.memory.gathering import ParameterSize
from hift_ds.memory.layout import Layout, Update
from hift_ds.state import unit_state as state

LARGE, SMALL, NORM, BUFFER = 5000, 30, 7, 40
ALL = LARGE + SMALL + NORM
# Elements of the two blocks' shards.
ALONE = (5008, 32 + 16)  # stage 0, or one rank
OF_FOUR = (1264, 16 + 16)  # slices of 1250, 8 and 2
TILE = 20_224  # of the larger block's 20,032 bytes of fp32
RING = 36_864  # three tiles of 1024 elements of 12 bytes
# An update changes the model's own weights, a parameter at a time; what shares a group of 256 with padding or another
# parameter, in a copy.
OWN, SHARED = 4864, 144  # of the larger block


class Layers(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.large = nn.Parameter(torch.ones(100, 50, dtype=dtype))
        self.small = nn.Parameter(torch.ones(10, 3, dtype=dtype))
        self.norm = nn.Parameter(torch.ones(7, dtype=dtype))
        self.register_buffer("steps", torch.zeros(5, dtype=torch.int64))


def layout_of(
    stage=0, world=1, dtype=torch.bfloat16, optimizer="AdamW", zero=(), state=(), params=(), frozen=(), hift=(),
    card=None, on_cpu=True, **extra
):  # fmt: skip
    mode = FakeTensorMode()
    with mode:
        model = SimpleNamespace(module=Layers(dtype), mode=mode)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": optimizer, "params": dict(params)},
        "zero_optimization": {"stage": stage, **dict(zero)},
        "hift": {"enabled": True, "blocks": [["large"], ["small", "norm"]], "state": dict(state), **dict(hift)},
        **({"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}),
        **extra,
    }
    device = "cpu" if on_cpu else "cuda"
    return Layout(model, resolve(config, world=world, device_type=device, separate_host=True), frozen, card)


def states(layout):
    return [layout.state_bytes(shard) for shard in layout.units]


def test_shards_are_slices_of_each_parameter_in_aligned_slots():
    assert [shard.numel for shard in layout_of(0, 1).units] == list(ALONE)
    assert [shard.numel for shard in layout_of(0, 4).units] == list(ALONE), "stage 0 shards nothing"
    for stage in (1, 2, 3):
        assert [shard.numel for shard in layout_of(stage, 4).units] == list(OF_FOUR)
        assert [shard.numel for shard in layout_of(stage, 1).units] == list(ALONE)


# State.


@pytest.mark.parametrize(
    ("dtype", "optimizer", "params", "state", "each"),
    [
        (torch.bfloat16, "AdamW", {}, {}, 4 + 4 + 4),
        (torch.float32, "AdamW", {}, {}, 4 + 4),  # the weights are their own masters
        (torch.bfloat16, "AdamW", {}, {"master": "split16"}, 2 + 4 + 4),
        (torch.bfloat16, "AdamW", {}, {"master": "split16", "moments": "bf16"}, 2 + 2 + 2),
        (torch.bfloat16, "AdamW", {}, {"master": "none", "moments": "bf16"}, 2 + 2),
        (torch.bfloat16, "AdamW", {}, {"moments": "bf16"}, 4 + 2 + 2),
        (torch.bfloat16, "SGD", {}, {}, 4),
        (torch.bfloat16, "SGD", {"momentum": 0.9}, {}, 4 + 4),
        (torch.float32, "SGD", {}, {}, 0),
        (torch.bfloat16, "Adagrad", {}, {}, 4 + 4),
        (torch.bfloat16, "Lion", {}, {}, 4 + 4),
    ],
)
def test_state_takes_so_many_bytes_an_element_of_the_padded_shard(dtype, optimizer, params, state, each):
    alone = layout_of(0, 4, dtype, optimizer, state=state, params=params)
    assert states(alone) == [each * numel for numel in ALONE]
    assert alone.host_state() == each * sum(ALONE)
    assert states(layout_of(2, 4, dtype, optimizer, state=state, params=params)) == [each * n for n in OF_FOUR]


def test_int8_moments_have_a_scale_for_each_group_and_one_more_for_each_run():
    found = states(layout_of(state={"master": "split16", "moments": "int8"}))
    assert found == [2 * n + 2 * (n + 4 * (groups + 1)) for n, groups in zip(ALONE, (20, 1), strict=True)]


def test_factored_moments_are_whole_on_every_rank():
    rows_and_columns = (4 * (100 + 50), 4 * (10 + 3 + 7))
    for stage, shards in ((0, ALONE), (2, OF_FOUR)):
        found = states(layout_of(stage, 4, optimizer="Adafactor"))
        assert found == [4 * n + extra for n, extra in zip(shards, rows_and_columns, strict=True)]


def test_host_updates_keep_a_master_of_fp32_weights_too():
    offload = {"offload_optimizer": {"device": "cpu"}}
    assert states(layout_of(2, 4, torch.float32, zero=offload)) == [12 * n for n in OF_FOUR]


def test_ring_is_no_larger_than_the_largest_blocks_state():
    assert layout_of().device_state == 3 * TILE
    assert layout_of(2, 4).device_state == 3 * 5120, "5,056 bytes of fp32"


def test_ring_is_as_large_as_it_may_be():
    assert layout_of(state={"ring_bytes": RING}).device_state == RING
    assert layout_of(state={"ring_bytes": RING + 12_287}).device_state == RING, "whole tiles alone"
    assert layout_of(state={"ring_bytes": RING + 12_288}).device_state == RING + 12_288, "a fourth tile"
    assert layout_of(state={"ring_bytes": 10**6}).device_state == 3 * TILE


def test_ring_is_by_default_the_largest_blocks_state_if_that_is_a_tenth_of_the_card(monkeypatch):
    monkeypatch.setattr(state, "RING_BYTES", RING)
    assert layout_of().device_state == RING, "no card is known"
    assert layout_of(card=10 * RING - 1).device_state == RING, "and never less"
    assert layout_of(card=10 * (RING + 12_288)).device_state == RING + 12_288, "a tenth, a part of the block"
    assert layout_of(card=10**7).device_state == 3 * TILE, "all of the block"
    assert layout_of(card=10**7, state={"ring_bytes": RING}).device_state == RING, "what is asked for"


def test_a_ring_too_small_for_three_tiles_is_refused():
    with pytest.raises(ValueError, match=rf"ring_bytes={RING - 1}: must be {RING} or more"):
        layout_of(state={"ring_bytes": RING - 1})


def test_factored_moments_have_their_share_of_the_ring():
    beside = 3 * 4 * (100 + 50)  # while a block is updated
    least = 3 * 4096 + beside
    assert layout_of(optimizer="Adafactor", state={"ring_bytes": least}).device_state == 3 * 4096
    with pytest.raises(ValueError, match=rf"ring_bytes={least - 1}: must be {least} or more"):
        layout_of(optimizer="Adafactor", state={"ring_bytes": least - 1})


def test_resident_state_is_all_on_the_device():
    layout = layout_of(2, 4, state={"residency": "device"})
    assert layout.device_state == 12 * sum(OF_FOUR)
    assert layout.host_state() == 0


def test_state_of_always_active_parameters_is_on_the_device_beside_the_ring():
    layout = layout_of(hift={"blocks": [["large"], ["small"]], "always_active": ["norm"]})
    assert layout.device_state == 3 * TILE + 12 * 16
    assert layout.host_state() == 12 * (ALONE[0] + 32), "and not on the host"
    assert layout.always.fqns == ("norm",)


def test_updates_on_the_host_need_no_state_on_the_device():
    layout = layout_of(2, 4, zero={"offload_optimizer": {"device": "cpu"}})
    assert layout.device_state == 0
    assert layout.host_state() == 12 * sum(OF_FOUR)


def test_frozen_parameters_are_in_no_block():
    layout = layout_of(frozen=("norm",), hift={"blocks": [["large"], ["small"]]})
    assert layout.block_plan.frozen == ("norm",)
    assert [shard.numel for shard in layout.units] == [ALONE[0], 32]
    assert layout.weights == BUFFER + 2 * ALL, "but on the device"


def test_a_layout_does_not_go_by_what_a_trace_has_left_off():
    mode = FakeTensorMode()
    with mode:
        model = SimpleNamespace(module=Layers(torch.bfloat16).requires_grad_(False), mode=mode)
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD"}, "hift": {"enabled": True}, "bf16": {"enabled": True}}
    assert Layout(model, resolve(config, world=1)).block_plan.frozen == ()


def test_forms_that_do_not_go_with_the_weights_or_the_rule_are_refused():
    with pytest.raises(ValueError, match=r"hift\.state\.master='split16': needs bf16"):
        layout_of(dtype=torch.float32, state={"master": "split16"})
    with pytest.raises(ValueError, match=r"hift\.state\.moments='int8'"):
        layout_of(optimizer="Adagrad", state={"moments": "int8"})


# Weights.


def test_weights_are_whole_below_stage_3():
    for stage in (0, 1, 2):
        assert layout_of(stage, 4).weights == BUFFER + 2 * ALL
        assert layout_of(stage, 4, torch.float32).weights == BUFFER + 4 * ALL
        assert layout_of(stage, 4).persistent == frozenset()


SLICES = 1250 + 8 + 2  # of four ranks


@pytest.mark.parametrize(
    ("thresholds", "persistent"),
    [((6, 10**6), ()), ((7, 10**6), ("norm",)), ((30, 10**6), ("small", "norm")), ((30, 37), ("small", "norm")),
     ((30, 36), ("small",)), ((10**6, 10**6), ("large", "small", "norm")), ((10**6, 37), ("small", "norm"))],
)  # fmt: skip
def test_weights_at_stage_3_are_slices_and_the_small_parameters_whole(thresholds, persistent):
    zero = dict(
        zip(("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"), thresholds, strict=True)
    )
    layout = layout_of(3, 4, zero=zero)
    numel = {"large": LARGE, "small": SMALL, "norm": NORM}
    assert layout.persistent == set(persistent)
    assert layout.weight_shards == 2 * SLICES
    assert layout.weights == BUFFER + 2 * SLICES + 2 * sum(numel[name] for name in persistent)
    assert layout.offloaded_weights == 0


def test_a_lone_ranks_slices_are_the_parameters():
    assert layout_of(3, 1).weights == BUFFER + 2 * ALL


def test_offloaded_slices_are_on_the_host():
    zero = {"stage3_param_persistence_threshold": 7, "offload_param": {"device": "cpu"}}
    layout = layout_of(3, 4, zero=zero)
    assert (layout.weights, layout.offloaded_weights) == (BUFFER + 2 * NORM, 2 * SLICES)
    alone = layout_of(3, 1, zero=zero)
    assert (alone.weights, alone.offloaded_weights) == (BUFFER + 2 * NORM, 2 * ALL)


def test_sizes_for_stage_3_have_every_ranks_slice_padded():
    assert layout_of(3, 4).sizes == {
        "large": ParameterSize(5000, 10_000, 10_000),
        "small": ParameterSize(30, 60, 64),
        "norm": ParameterSize(7, 14, 16),
    }


def test_limits_are_the_configs():
    zero = {"stage3_prefetch_bucket_size": 11, "stage3_max_live_parameters": 12, "stage3_max_reuse_distance": 13}
    found = layout_of(3, 4, zero=zero).config.zero
    assert (found.prefetch_bucket_size, found.max_live_parameters, found.max_reuse_distance) == (11, 12, 13)


# Update.


def test_update_makes_new_weights_and_the_tiles_gradient_in_fp32():
    layout, numel = layout_of(), ALONE[0]
    assert numel == OWN + SHARED
    assert layout.update(layout.units[0], 777) == Update(777, 2 * SHARED + 4 * OWN)
    small_ring = layout_of(state={"ring_bytes": RING})
    assert small_ring.update(small_ring.units[0], 777) == Update(777, 2 * SHARED + 4 * 1024), "a tile at a time"
    assert small_ring.update(small_ring.units[1], 5) == Update(5, 6 * ALONE[1])


def test_weights_of_another_dtype_than_their_block_s_are_updated_in_a_copy():
    layout = layout_of()
    shard = layout.units[0]
    with layout.model.mode:
        shard.params[0].data = torch.ones(100, 50)
        shard.params = (*shard.params, torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16)))
    assert layout.update(shard, 0) == Update(0, 4 * OWN + 4 * OWN)


def test_fused_kernels_and_updates_on_the_host_make_no_fp32_gradient():
    for keywords in (
        {"state": {"master": "split16"}},
        {"hift": {"kernel": "triton"}},
        {"on_cpu": False},  # null, on a card where nothing is wrong with the kernels
        {"zero": {"offload_optimizer": {"device": "cpu"}}},
    ):
        layout = layout_of(**keywords)
        made = 0 if "zero" in keywords else 2 * SHARED  # from the host new weights go to their place
        assert layout.update(layout.units[0], 777) == Update(777, made)


def test_resident_state_is_updated_by_whole_runs():
    layout = layout_of(state={"residency": "device"})
    assert layout.update(layout.units[0], 0) == Update(0, 2 * SHARED + 4 * OWN)


def test_adafactor_makes_a_whole_runs_gradient_its_largest_estimate_and_factored_moments_three_times():
    factored = 3 * 4 * (100 + 50)  # of the largest block, whichever is updated
    layout = layout_of(optimizer="Adafactor")
    assert layout.update(layout.units[0], 0) == Update(0, 2 * ALONE[0] + factored + 4 * ALONE[0] + 4 * LARGE)
    assert layout.update(layout.units[1], 0) == Update(0, 2 * ALONE[1] + factored + 4 * ALONE[1] + 4 * SMALL)
    resident = layout_of(optimizer="Adafactor", state={"residency": "device"})
    assert resident.update(resident.units[0], 0) == Update(0, 2 * ALONE[0] + 4 * ALONE[0] + 4 * LARGE)


def test_update_holds_what_is_sent_where_that_is_more_than_the_gradient():
    four, two = layout_of(2, 4), layout_of(2, 2)
    own, numel = 2 * OF_FOUR[0], OF_FOUR[0]
    # All four slots of the bucket are received when the gradient is gone: 10,112 bytes against 2,528 + 4,096.
    assert four.update(four.units[0], own) == Update(0, 2 * numel + 4 * own)
    half = 2512  # a slice of 2500
    assert two.update(two.units[0], 2 * half) == Update(2 * half, 2 * half + 4 * 2304)


def test_new_weights_are_sent_in_buckets_of_allgather_bucket_size():
    fused = {"hift": {"kernel": "triton"}}
    for bucket, packed in ((10**9, 2 * 4 * 32), (1, 2 * 4 * 16)):
        layout = layout_of(2, 4, zero={"allgather_bucket_size": bucket}, **fused)
        assert layout.update(layout.units[1], 64) == Update(0, 2 * 32 + packed)
        assert layout.published_bytes(1) == 2 * 4 * 32, "all of it, in one bucket or two"


def test_nothing_is_sent_by_stage_3_or_a_lone_rank():
    alone = (OWN, SHARED)
    for layout, (own, shared) in ((layout_of(3, 4), (1024, 240)), (layout_of(2, 1), alone), (layout_of(0, 4), alone)):
        assert layout.update(layout.units[0], 777) == Update(777, 4 * own + 2 * shared)


# Gradients, by the training run's reducer.


def on_the_way(layout, block, order):
    """Bytes of gradients up to the update."""
    found = layout.gradient_bytes(block, order)
    assert found.updates == (Update(),) * len(order), "the update comes after backward"
    return dict(before=found.before, events=found.events, finish=found.finish, sent=found.sent)


def test_a_lone_rank_adds_each_gradient_to_the_shard():
    layout = layout_of(2, 1)
    shard = 2 * ALONE[1]
    assert on_the_way(layout, 1, ["norm", "small"]) == dict(
        before=0, events=((14 + shard, shard), (60 + shard, shard)), finish=shard, sent=0
    )


def test_accumulated_gradients_are_fp32_and_there_before_the_last_backward():
    layout = layout_of(2, 1, gradient_accumulation_steps=3)
    shard = 4 * ALONE[0]
    assert layout.config.accumulation_dtype == torch.float32
    assert on_the_way(layout, 0, ["large"]) == dict(
        before=shard, events=((2 * LARGE + shard, shard),), finish=shard, sent=0
    )


def test_stage_2_reduces_a_bucket_as_soon_as_it_is_whole():
    layout, packed, slot = layout_of(2, 4, zero={"overlap_comm": False}), 2 * 4 * 1264, 2 * 1264
    assert on_the_way(layout, 0, ["large"]) == dict(
        before=0, events=((2 * LARGE + packed, slot),), finish=slot, sent=packed
    )


def test_overlapped_reductions_hold_their_bucket_until_the_end():
    layout, packed, slot = layout_of(2, 4, zero={"overlap_comm": True}), 2 * 4 * 1264, 2 * 1264
    assert on_the_way(layout, 0, ["large"]) == dict(
        before=0, events=((2 * LARGE + packed, packed + slot),), finish=packed + 2 * slot, sent=packed
    )


def test_stages_0_and_1_keep_whole_gradients_until_backward_is_over():
    whole, packed = 2 * ALONE[0], 2 * 4 * 1264
    # Stage 0: the bucket and the result, once the gradient itself is gone. Stage 1: the gradient and its bucket.
    for stage, finish, sent in ((0, 2 * whole, whole), (1, 2 * LARGE + packed, packed)):
        found = on_the_way(layout_of(stage, 4), 0, ["large"])
        assert found == dict(before=0, events=((2 * LARGE, 2 * LARGE),), finish=finish, sent=sent)


def test_always_active_gradients_are_reduced_beside_the_blocks():
    layout = layout_of(hift={"blocks": [["large"], ["small"]], "always_active": ["norm"]})
    assert layout.gradient_bytes(1, ["norm", "small"]).update.gradients == 2 * 32 + 2 * 16
    assert layout.gradient_bytes(0, ["norm", "large"]).update.gradients == 2 * ALONE[0] + 2 * 16


def test_gradient_bytes_leaves_no_gradient_behind():
    layout = layout_of(1, 4)
    first = layout.gradient_bytes(0, ["large"])
    assert all(param.grad is None for param in layout.params.values())
    assert layout.gradient_bytes(0, ["large"]) == first


# Traffic.


@pytest.mark.parametrize(
    ("keywords", "each"),
    [
        ({}, (12, 12)),
        ({"dtype": torch.float32}, (8, 8)),
        ({"state": {"master": "split16"}}, (10, 10)),
        ({"state": {"master": "split16", "moments": "bf16"}}, (6, 6)),
        ({"state": {"master": "none", "moments": "bf16"}}, (4, 4)),
        ({"state": {"residency": "device"}}, (0, 0)),
        ({"zero": {"offload_optimizer": {"device": "cpu"}}}, (2, 2)),  # weights, gradient
        ({"zero": {"offload_optimizer": {"device": "cpu"}}, "gradient_accumulation_steps": 2}, (2, 4)),
    ],
)
def test_bus_carries_so_many_bytes_an_element_each_way(keywords, each):
    for world, shards in ((1, ALONE), (4, OF_FOUR)):
        layout = layout_of(2, world, **keywords)
        for shard, numel in zip(layout.units, shards, strict=True):
            assert layout.bus_bytes(shard) == (each[0] * numel, each[1] * numel)


def test_adafactors_master_crosses_the_bus_twice_to_the_device():
    layout = layout_of(optimizer="Adafactor")
    back = 4 * ALONE[0] + 4 * (100 + 50)
    assert layout.bus_bytes(layout.units[0]) == (back + 4 * ALONE[0], back)


def test_update_hands_new_weights_to_a_gather_at_stages_1_and_2():
    for stage in (1, 2):
        assert [layout_of(stage, 4).published_bytes(block) for block in (0, 1)] == [2 * 4 * n for n in OF_FOUR]
    assert layout_of(0, 4).published_bytes(0) == 0
    assert layout_of(2, 1).published_bytes(0) == 0


def test_stage_3_gathers_its_persistent_parameters_again():
    zero = {"stage3_param_persistence_threshold": 7}
    assert [layout_of(3, 4, zero=zero).published_bytes(block) for block in (0, 1)] == [16, 16]
    assert layout_of(3, 1, zero=zero).published_bytes(0) == 0


def test_sums_of_factored_moments_are_sent_by_the_stages_that_shard():
    sums = 4 * (100 + 50)
    assert layout_of(2, 4, optimizer="Adafactor").published_bytes(0) == sums + 2 * 4 * OF_FOUR[0]
    assert layout_of(0, 4, optimizer="Adafactor").published_bytes(0) == 0


def test_always_active_weights_are_sent_with_every_block():
    layout = layout_of(2, 4, hift={"blocks": [["large"], ["small"]], "always_active": ["norm"]})
    assert [layout.published_bytes(block) for block in (0, 1)] == [2 * 4 * (1264 + 16), 2 * 4 * (16 + 16)]
