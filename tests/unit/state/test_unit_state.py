"""A block's state: which part of each tensor a tile has, and what a fresh start is."""

import pytest
import torch
from torch import nn

from hift_ds.config.keys import StateConfig
from hift_ds.config.optimizers import rule_from_config
from hift_ds.shards import UnitShard
from hift_ds.state.formats import GROUP
from hift_ds.state.unit_state import LARGEST_TILE_BYTES, RING_BYTES, TILE_BYTES, Storage, UnitState, size_ring

CPU = torch.device("cpu")
SIZES = (300, 64, 1000, 1, 257, 700, 128)


def state_of(kind: str, form: StateConfig, tile_numel: int = GROUP, one_run: bool = False) -> UnitState:
    """Each parameter a param group and so a run of its own, or all in one."""
    rule, defaults = rule_from_config(kind, {})
    generator = torch.Generator().manual_seed(0)
    params = [(f"p{i}", nn.Parameter(torch.randn(n, generator=generator).bfloat16())) for i, n in enumerate(SIZES)]
    groups = [{**defaults, "params": [param]} for _, param in params]
    group_of = {name: 0 if one_run else index for index, (name, _) in enumerate(params)}
    shard = UnitShard(params, group_of, 2, 1)
    state = UnitState(shard, rule, groups, Storage(CPU, form), tile_numel)
    assert len(shard.runs) == (1 if one_run else len(SIZES))
    return state


@pytest.mark.parametrize(
    "form", [StateConfig(), StateConfig("split16", "bf16"), StateConfig("none", "int8"), StateConfig("fp32", "int8")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("tile_numel", [GROUP, 4 * GROUP])
def test_every_element_belongs_to_one_tile_and_no_scale_to_two(form, tile_numel):
    state = state_of("AdamW", form, tile_numel)
    counts = {name: torch.zeros(tensor.numel(), dtype=torch.int32) for name, tensor in state.tensors.items()}
    for tile in state.tiles:
        for name, part in tile.home.items():
            counts[name][part.storage_offset() : part.storage_offset() + part.numel()] += 1
    for name, count in counts.items():
        assert count.max() == 1, name
        assert name.endswith("_scale") or count.min() == 1, name
    spans = [range(tile.span.start, tile.span.stop) for tile in state.tiles]
    assert sorted(i for span in spans for i in span) == list(range(state.shard.numel))


@pytest.mark.parametrize(("kind", "moments"), [("AdamW", "int8"), ("Adagrad", "fp32"), ("Adafactor", "fp32")])
def test_a_reset_state_is_that_of_the_start_but_for_its_masters(kind, moments):
    state = state_of(kind, StateConfig("fp32", moments))
    fresh = {name: tensor.clone() for name, tensor in {**state.slots, **state.extra}.items()}
    master = state.master.clone()
    for tensor in state.all_tensors():
        tensor.fill_(3)
    state.step = 5
    state.reset()
    assert state.step == 0
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in {**state.slots, **state.extra}.items())
    assert bool((state.master == 3).all())
    state.refresh_master()
    assert torch.equal(state.master, master)


def test_the_remainders_of_a_split_master_are_zero_where_masters_are_taken_from_the_weights():
    state = state_of("AdamW", StateConfig("split16"))
    state.master.fill_(7)
    state.refresh_master()
    assert not state.master.any()
    weights = torch.cat([state.read(index, None) for index in range(len(SIZES))])
    assert torch.equal(weights, torch.cat([state.shard.weight_slice(i).float() for i in range(len(SIZES))]))


def test_a_written_split_master_is_read_back_bit_by_bit_and_rounds_to_its_weight():
    state = state_of("AdamW", StateConfig("split16"))
    for index in range(len(SIZES)):
        numel = state.shard.segments[index].numel
        value = torch.randn(numel, generator=torch.Generator().manual_seed(index))
        state.write(index, None, value)
        assert torch.equal(state.read(index, None), value)
        assert torch.allclose(state.shard.weight_slice(index).float(), value, rtol=2**-8, atol=0.0)


def test_a_half_way_master_becomes_the_weight_that_the_kernels_would_store():
    """They round half up in magnitude; a plain copy would round half to even, and the remainder would not fit."""
    state = state_of("AdamW", StateConfig("split16"))
    value = torch.full((state.shard.segments[0].numel,), 1.0 + 2.0**-8)  # between two bf16 numbers, the lower is even
    state.write(0, None, value)
    assert torch.equal(state.read(0, None), value)


def test_moments_of_8_bits_are_read_with_the_scales_of_their_run():
    state = state_of("AdamW", StateConfig("fp32", "int8"))
    for tile in state.tiles:
        for name in ("exp_avg", "exp_avg_sq"):
            tile.home[name].fill_(127 if name == "exp_avg" else 254)  # the code of 1
            tile.home[f"{name}_scale"].fill_(10.0 + tile.run)
    for index in range(len(SIZES)):
        for name in ("exp_avg", "exp_avg_sq"):
            values = state.read(index, name)
            assert torch.equal(values, torch.full_like(values, 10.0 + index))
    state.tensors["exp_avg"].fill_(127 | 128)
    assert bool((state.read(0, "exp_avg") < 0).all())


def test_moments_of_8_bits_are_read_with_the_scale_of_their_own_group():
    """A parameter begins and ends inside groups that it shares with its neighbours."""
    state = state_of("AdamW", StateConfig("fp32", "int8"), one_run=True)
    state.tensors["exp_avg"].fill_(127)
    state.tensors["exp_avg_scale"].copy_(torch.arange(state.tensors["exp_avg_scale"].numel()))
    for index, segment in enumerate(state.shard.segments):
        groups = torch.arange(segment.offset, segment.offset + segment.numel) // GROUP
        assert torch.equal(state.read(index, "exp_avg"), groups.float())


@pytest.mark.parametrize("form", [StateConfig(), StateConfig("split16", "bf16"), StateConfig("none", "int8")], ids=str)
def test_a_block_of_mixed_dtypes_keeps_fp32_masters(form):
    rule, defaults = rule_from_config("AdamW", {})
    params = [("half", nn.Parameter(torch.randn(100).bfloat16())), ("full", nn.Parameter(torch.randn(30)))]
    groups = [{**defaults, "params": [param for _, param in params]}]
    state = UnitState(UnitShard(params, {"half": 0, "full": 0}, 1, 0), rule, groups, Storage(CPU, form))
    value = torch.randn(100)
    state.write(0, None, value)
    assert state.master.dtype == torch.float32
    assert torch.equal(state.read(0, None), value)
    assert torch.equal(params[0][1], value.bfloat16())


LAYER, EMBEDDING, GIB = 202_383_360, 131_072_000, 1 << 30  # elements of a 7B Llama's blocks


def ring_of(ring_bytes=None, card=None, numels=(EMBEDDING, LAYER), each=12, beside=0):
    """The ring of blocks of bf16 weights with fp32 state, without their memory; with SGD 4 bytes an element."""
    rule, defaults = rule_from_config("AdamW" if each == 12 else "SGD", {"lr": 0.1})
    params = [nn.Parameter(torch.empty(numel, dtype=torch.bfloat16, device="meta")) for numel in numels]
    shards = [UnitShard([("weight", param)], {"weight": 0}, 1, 0) for param in params]
    storage = Storage(CPU)
    shapes = [[(shard, storage.shapes(shard, rule, [{**defaults, "params": params}]))] for shard in shards]
    plan = size_ring(shapes, ring_bytes, beside, card)
    return plan, plan.num_slots * plan.slot_bytes


@pytest.mark.parametrize(("card", "each"), [(24 * GIB, 12), (80 * GIB, 12), (16 * GIB, 4)])
def test_the_default_ring_holds_the_largest_block_where_that_is_a_tenth_of_the_card(card, each):
    plan, nbytes = ring_of(card=card, each=each)
    assert each * LAYER <= nbytes < each * LAYER * 1.001, "all of the block, and no slot half empty"
    assert plan.num_slots == -(-LAYER // plan.tile_numel)
    assert LARGEST_TILE_BYTES // 2 <= plan.slot_bytes <= LARGEST_TILE_BYTES


def test_the_default_ring_takes_no_more_than_a_tenth_of_the_card():
    plan, nbytes = ring_of(card=16 * GIB)
    assert 1.6 * GIB - LARGEST_TILE_BYTES < nbytes <= 1.6 * GIB < 12 * LAYER
    assert plan.num_slots >= 4


@pytest.mark.parametrize("card", [None, GIB])
def test_the_default_ring_is_never_under_128_mib_and_that_where_no_card_is_known(card):
    plan, nbytes = ring_of(card=card)
    assert RING_BYTES - 4 * 12 * 1024 <= nbytes <= RING_BYTES
    assert plan.num_slots == 4


@pytest.mark.parametrize(
    ("ring", "slots", "tile"),
    [(48 << 20, 3, 16 << 20), (96 << 20, 3, TILE_BYTES), (128 << 20, 4, TILE_BYTES), (256 << 20, 4, 64 << 20),
     (512 << 20, 4, LARGEST_TILE_BYTES), (GIB, 8, LARGEST_TILE_BYTES)],
)  # fmt: skip
def test_tiles_grow_with_the_ring_as_long_as_it_has_room_for_four(ring, slots, tile):
    plan, nbytes = ring_of(ring)
    assert plan.num_slots == slots and nbytes <= ring
    assert 0 <= tile - plan.slot_bytes < 12 * 1024 + 3 * 256


def test_a_small_block_is_cut_into_several_tiles_too():
    plan, nbytes = ring_of(card=80 * GIB, numels=(10_000_000, 1_000_000))
    assert plan.num_slots == 4 and nbytes < 12 * 10_000_000 * 1.001


def test_factored_moments_are_a_part_of_the_default_ring():
    assert ring_of(card=16 * GIB, beside=GIB)[1] <= 0.6 * GIB < ring_of(card=16 * GIB, each=4)[1]


@pytest.mark.parametrize(
    ("kind", "hyper", "form"),
    [
        ("AdamW", {}, StateConfig()),
        ("AdamW", {}, StateConfig("split16", "int8")),
        ("Adagrad", {"initial_accumulator_value": 0.5}, StateConfig()),
    ],
    ids=str,
)
def test_what_fills_a_tile_of_a_fresh_state_is_what_a_reset_leaves(kind, hyper, form):
    rule, defaults = rule_from_config(kind, hyper)
    params = [("a", nn.Parameter(torch.randn(700).bfloat16())), ("b", nn.Parameter(torch.randn(90).bfloat16()))]
    groups = [{**defaults, "params": [param]} for _, param in params]
    state = UnitState(UnitShard(params, {"a": 0, "b": 1}, 1, 0), rule, groups, Storage(CPU, form), GROUP)
    for tensor in state.slots.values():
        tensor.fill_(3)
    state.reset()
    for tile in state.tiles:
        assert set(tile.initial) == set(state.slots)
        assert all(bool((tile.home[name] == value).all()) for name, value in tile.initial.items())
