"""The shard layout: slices, slots, runs, buckets, and moving between whole parameters and shards."""

import random
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import Init

from hift_ds.shards import ALIGNMENT, UnitShard, full_numel, is_partitioned
from hift_ds.state.formats import GROUP
from hift_ds.zero.gradients import after_the_sum, before_the_sum
from hift_ds.zero.weights import OwnWeights

# Smaller than the number of ranks, a scalar, an empty one, sizes that no world divides.
SHAPES = {"a": (37, 5), "b": (3,), "scalar": (), "c": (64,), "empty": (0, 4), "d": (7, 11, 2), "one": (1,)}
GROUPS = {"a": 1, "b": 0, "scalar": 0, "c": 1, "empty": 0, "d": 2, "one": 1}
WORLDS = (1, 2, 3, 4, 7)


def parameters(dtypes=None):
    generator = torch.Generator().manual_seed(0)
    return [
        (fqn, torch.nn.Parameter(torch.randn(shape, generator=generator).to((dtypes or {}).get(fqn, torch.float32))))
        for fqn, shape in SHAPES.items()
    ]


def shards(world, params=None, groups=GROUPS):
    params = parameters() if params is None else params
    return [UnitShard(params, groups, world, rank) for rank in range(world)]


@pytest.mark.parametrize("world", WORLDS)
def test_slices_of_all_ranks_are_the_parameter_once(world):
    for index in range(len(SHAPES)):
        segments = [shard.segments[index] for shard in shards(world)]
        covered = [element for s in segments for element in range(s.start, s.start + s.numel)]
        assert covered == list(range(segments[0].shape.numel()))
        assert len({(s.offset, s.padded_numel, s.fqn) for s in segments}) == 1, "slots must be alike on all ranks"


@pytest.mark.parametrize("world", WORLDS)
def test_slices_have_zero_3_s_size(world):
    init = object.__new__(Init)  # its __init__ needs a process group
    init._partition_world_size = lambda param: world
    init.dp_world_size = world
    if not hasattr(Init, "num_partitions"):  # DeepSpeed 0.18's name, no property there
        init.num_partitions = world
    for shard in shards(world):
        for segment in shard.segments:
            numel = segment.shape.numel()
            zero3 = init._aligned_size(SimpleNamespace(ds_numel=numel)) // world
            assert segment.start == min(shard.rank * zero3, numel)
            assert segment.numel == max(0, min(zero3, numel - segment.start))


@pytest.mark.parametrize("world", WORLDS)
def test_slots_are_aligned_and_side_by_side(world):
    for shard in shards(world):
        end = 0
        for segment in shard.segments:
            assert segment.offset == end
            assert segment.offset % ALIGNMENT == segment.padded_numel % ALIGNMENT == 0
            assert segment.padded_numel >= segment.numel
            end += segment.padded_numel
        assert shard.numel == end


def test_a_parameter_smaller_than_the_world_lies_on_the_first_ranks():
    numels = [shard.segments[shard.fqns.index("b")].numel for shard in shards(4)]
    assert numels == [1, 1, 1, 0]
    assert [shard.segments[shard.fqns.index("one")].numel for shard in shards(4)] == [1, 0, 0, 0]


def test_a_hand_made_layout():
    """Ten elements over three ranks: slices of 4, 4 and 2, each in a slot of 16."""
    pairs = [("w", torch.nn.Parameter(torch.arange(10.0))), ("v", torch.nn.Parameter(torch.arange(2.0)))]
    layout = [UnitShard(pairs, {"w": 0, "v": 0}, 3, rank) for rank in range(3)]
    assert [(s.start, s.numel) for shard in layout for s in shard.segments] == [
        (0, 4), (0, 1), (4, 4), (1, 1), (8, 2), (2, 0),
    ]  # fmt: skip
    assert layout[0].numel == 32
    out = [shard.read_weights(torch.full((32,), -1.0)).tolist() for shard in layout]
    assert out[0] == [0, 1, 2, 3] + [0] * 12 + [0] * 16
    assert out[1] == [4, 5, 6, 7] + [0] * 12 + [1] + [0] * 15
    assert out[2] == [8, 9] + [0] * 14 + [0] * 16


@pytest.mark.parametrize("world", WORLDS)
def test_runs_are_the_param_groups_one_after_the_other(world):
    shard = shards(world)[-1]
    assert [run.group for run in shard.runs] == [0, 1, 2]
    assert shard.runs[0].start == 0
    assert all(left.stop == right.start for left, right in zip(shard.runs, shard.runs[1:], strict=False))
    assert shard.runs[-1].stop == shard.numel
    for run in shard.runs:
        assert run.start % ALIGNMENT == 0
        members = [s for s in shard.segments if GROUPS[s.fqn] == run.group]
        assert [s.fqn for s in run.segments] == [s.fqn for s in members]
        assert [s.offset + run.start for s in run.segments] == [s.offset for s in members]


def test_the_block_s_order_is_kept_within_a_group():
    shard = shards(2)[0]
    assert shard.fqns == ("b", "scalar", "empty", "a", "c", "one", "d")
    assert [shard.position[param] for param in shard.params] == list(range(7))


@pytest.mark.parametrize("max_numel", [0, 1, 200, 10**9])
@pytest.mark.parametrize("world", WORLDS)
def test_buckets_cover_everything_once_from_the_last_on(world, max_numel):
    dtypes = {"c": torch.bfloat16, "d": torch.bfloat16}
    shard = UnitShard(parameters(dtypes), GROUPS, world, 0)
    buckets = shard.buckets(max_numel)
    assert [index for bucket in buckets[::-1] for index in bucket] == list(range(len(SHAPES)))
    for bucket in buckets:
        assert len({shard.params[index].dtype for index in bucket}) == 1
        size = sum(shard.segments[index].padded_numel for index in bucket) * world
        assert size <= max_numel or sum(shard.segments[index].padded_numel > 0 for index in bucket) <= 1
        span = shard.span(bucket)
        assert span.stop - span.start == size // world
    if max_numel == 10**9:
        assert len(buckets) == 4, "a new bucket only where the dtype changes: d | one | c | the rest"


@pytest.mark.parametrize("max_numel", [0, 200, 10**9])
@pytest.mark.parametrize("world", WORLDS)
def test_unpack_is_the_inverse_of_pack(world, max_numel):
    shard = shards(world)[0]
    whole = [param.detach().clone() for param in shard.params]
    packed = {b: shard.pack(b, [whole[i] for i in b], torch.float32) for b in shard.buckets(max_numel)}
    for param in shard.params:
        param.data.fill_(-7.0)
    for bucket, values in packed.items():
        shard.unpack(bucket, values)
    for param, value in zip(shard.params, whole, strict=True):
        assert torch.equal(param.detach(), value)


@pytest.mark.parametrize("world", WORLDS)
def test_pack_lays_out_each_rank_s_shard_in_turn(world):
    layout = shards(world)
    everything = range(len(SHAPES))
    packed = layout[0].pack(everything, [param.detach() for param in layout[0].params], torch.float32)
    for rank, part in enumerate(packed.view(world, -1)):
        assert torch.equal(part, layout[rank].read_weights(torch.full((layout[rank].numel,), 9.0)))


def test_pack_takes_none_as_zeros_and_casts():
    shard = shards(2)[0]
    bucket = range(len(SHAPES))
    tensors = [torch.ones_like(p) if fqn == "a" else None for fqn, p in zip(shard.fqns, shard.params, strict=True)]
    packed = shard.pack(bucket, tensors, torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    assert packed.sum() == 37 * 5
    assert torch.equal(shard.pack(bucket, [None] * len(SHAPES), torch.float32), torch.zeros(2 * shard.numel))


def test_pack_takes_gradients_that_are_not_contiguous():
    pair = ("w", torch.nn.Parameter(torch.zeros(4, 6)))
    gradient = torch.arange(24.0).view(6, 4).t()
    shard = UnitShard([pair], {"w": 0}, 1, 0)
    assert torch.equal(shard.pack(range(1), [gradient], torch.float32)[:24], gradient.flatten())


def write(new, values: torch.Tensor, length: int) -> None:
    """Values of a whole shard, in ranges of a length, as an update's tiles."""
    for start in range(0, values.numel(), length):
        span = slice(start, min(start + length, values.numel()))
        piece = new.begin(span, read=False)
        new.end(span, piece.copy_(values[span]) if start else values[span])


@pytest.mark.parametrize("length", [7, 200, 10**9])
def test_one_rank_writes_what_it_has_read(length):
    shard = shards(1)[0]
    before = [param.detach().clone() for param in shard.params]
    copy = shard.read_weights(torch.empty(shard.numel, dtype=torch.float64))
    for param in shard.params:
        param.data.zero_()
    write(OwnWeights(shard, torch.device("cpu")), copy, length)
    assert all(torch.equal(param.detach(), value) for param, value in zip(shard.params, before, strict=True))


def test_weights_are_written_in_each_parameter_s_dtype():
    shard = UnitShard(parameters({"a": torch.bfloat16}), GROUPS, 1, 0)
    new = torch.full((shard.numel,), 1.0 + 2**-10)
    write(OwnWeights(shard, torch.device("cpu")), new, 50)
    values = {fqn: param.detach() for fqn, param in zip(shard.fqns, shard.params, strict=True)}
    assert values["a"].dtype == torch.bfloat16
    assert torch.equal(values["a"], torch.ones(37, 5, dtype=torch.bfloat16))
    assert torch.equal(values["c"], torch.full((64,), 1.0 + 2**-10))


def test_a_zero_3_parameter_is_read_and_written_through_its_shard():
    """A stand-in with the attributes of DeepSpeed's: rank 1 of 2 holds the last two of five elements, padded."""
    param = torch.nn.Parameter(torch.empty(0))
    param.ds_id, param.ds_numel, param.ds_shape = 0, 5, torch.Size([5])
    param.ds_tensor = torch.tensor([3.0, 4.0, 99.0])
    assert is_partitioned(param)
    assert full_numel(param) == 5
    shard = UnitShard([("w", param)], {"w": 0}, 2, 1)
    out = shard.read_weights(torch.full((16,), -1.0))
    assert out.tolist() == [3.0, 4.0] + [0.0] * 14
    write(OwnWeights(shard, torch.device("cpu")), torch.arange(16.0), 5)
    assert param.ds_tensor.tolist() == [0.0, 1.0, 99.0]


@pytest.mark.parametrize(
    ("predivide", "mean", "before", "after"),
    [(1.0, True, 8.0, 2.0), (4.0, True, 2.0, 8.0), (2.0, True, 4.0, 4.0), (2.0, False, 8.0, 8.0)],
)
def test_averaging_divides_before_and_after_as_asked(predivide, mean, before, after):
    config = SimpleNamespace(predivide=predivide, mean=mean, world=4)
    packed, reduced = torch.tensor([8.0]), torch.tensor([8.0])
    before_the_sum(packed, config)
    after_the_sum(reduced, config)
    assert (packed.item(), reduced.item()) == (before, after)


@pytest.mark.parametrize("seed", range(40))
def test_parts_of_a_tile_are_of_one_parameter_each_but_where_two_meet(seed):
    draw = random.Random(seed)
    sizes = [draw.choice((1, 100, 256, 512, 3000)) + draw.choice((0, 0, 7)) for _ in range(draw.randint(1, 6))]
    world, first_group, length = draw.randint(1, 3), draw.randint(0, 8), draw.randint(1, 9000)
    names = [str(index) for index in range(len(sizes))]
    params = [(name, torch.nn.Parameter(torch.zeros(size))) for name, size in zip(names, sizes, strict=True)]
    shard = UnitShard(params, dict.fromkeys(names, 0), world, world - 1)
    start = min(first_group * GROUP, shard.numel - 1)
    tile = slice(start, min(start + length, shard.numel))
    parts = list(shard.parts(tile, GROUP))
    assert [part.start for part in parts] == [tile.start, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == tile.stop and all(part.start < part.stop for part in parts)
    for part in parts:
        owned = [piece.stop - piece.start for piece, _ in shard.weight_pieces(part)]
        assert (part.start - tile.start) % GROUP == 0
        assert part.stop - part.start <= GROUP or owned in ([part.stop - part.start], []), "a parameter, or padding"
