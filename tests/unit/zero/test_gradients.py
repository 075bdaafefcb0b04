"""GradientReducer: which collectives, in which order, with what in them."""

from types import SimpleNamespace

import pytest
import torch

from hift_ds.shards import UnitShard
from hift_ds.zero import gradients
from hift_ds.zero.gradients import GradientReducer
from hift_ds.zero.step_check import NORM_ROW, sum_of_squares

WORLD = 2
SHAPES = {"a": (5, 3), "b": (7,), "c": (2, 2), "d": (1,)}


class Handle:
    def __init__(self, log, number, work):
        self.log, self.number, self.work = log, number, work

    def wait(self):
        self.log.append(("wait", self.number))
        self.work()


class FakeComm:
    """Two ranks of which this is rank `rank`; the other sends the same as this one."""

    def __init__(self, rank=0):
        self.rank, self.log, self.count = rank, [], 0

    def _start(self, name, packed, work):
        self.log.append((name, tuple(packed.flatten().tolist())))
        self.count += 1
        return Handle(self.log, self.count - 1, work)

    def all_reduce(self, packed, group, async_op):
        assert async_op
        return self._start("all_reduce", packed, lambda: packed.mul_(WORLD))

    def reduce_scatter_tensor(self, out, packed, group, async_op):
        assert async_op
        return self._start("reduce_scatter", packed, lambda: out.copy_(packed.view(WORLD, -1)[self.rank] * WORLD))

    def names(self):
        return [entry[0] for entry in self.log]


@pytest.fixture
def comm(monkeypatch):
    fake = FakeComm()
    monkeypatch.setattr(gradients, "dist", fake)
    return fake


def make(
    stage, *, world=WORLD, rank=0, dtype=torch.float32, accumulation=None, communication=None, bucket_numel=0,
    overlap=True,
):  # fmt: skip
    """A reducer, open for one block; one bucket per parameter unless told otherwise."""
    params = {fqn: torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for fqn, shape in SHAPES.items()}
    shard_world = world if stage else 1
    shard = UnitShard(list(params.items()), dict.fromkeys(params, 0), shard_world, rank if stage else 0)
    zero = SimpleNamespace(reduce_bucket_size=bucket_numel, overlap_comm=overlap)
    config = SimpleNamespace(
        stage=stage, world=world, zero=zero, communication_dtype=communication or dtype, predivide=1.0, mean=True,
        accumulation_dtype=accumulation or dtype,
    )  # fmt: skip
    reducer = GradientReducer(config, None)
    reducer.open([shard])
    return reducer, shard, params


def give(reducer, params, values):
    """One backward: gradients arrive in the order of `values`; autograd adds to what is there."""
    for fqn, value in values.items():
        gradient = torch.full_like(params[fqn], value)
        params[fqn].grad = gradient if params[fqn].grad is None else params[fqn].grad + gradient
        reducer.on_gradient(params[fqn])


def by_name(shard, result):
    return {s.fqn: set(result[s.offset : s.offset + s.numel].tolist()) for s in shard.segments}


def padding(shard, result):
    return [x for s in shard.segments for x in result[s.offset + s.numel : s.offset + s.padded_numel].tolist()]


ALL = {"d": 4.0, "c": 3.0, "b": 2.0, "a": 1.0}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_averaged_and_padding_is_zero(comm, stage):
    reducer, shard, params = make(stage)
    give(reducer, params, ALL)
    reducer.finish_backward(boundary=True)
    result, touched = reducer.take(shard)
    # Both ranks sent the same, so the mean is what was sent.
    assert by_name(shard, result) == {fqn: {value} for fqn, value in ALL.items()}
    assert set(padding(shard, result)) == {0.0}
    assert touched == set(params.values())
    assert all(param.grad is None for param in params.values())
    assert set(comm.names()) == {"all_reduce" if stage == 0 else "reduce_scatter", "wait"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_collectives_have_one_order_whatever_the_gradients_order(comm, stage):
    sent = []
    for order in (ALL, dict(sorted(ALL.items())), {"b": 2.0, "d": 4.0, "a": 1.0, "c": 3.0}):
        comm.log.clear()
        reducer, _, params = make(stage)
        give(reducer, params, order)
        reducer.finish_backward(boundary=True)
        sent.append([entry for entry in comm.log if entry[0] != "wait"])
    assert sent[0] == sent[1] == sent[2]
    assert len(sent[0]) == 4
    # From the last parameter of the block, whose gradient backward yields first, to the first.
    assert [max(values) for _, values in sent[0]] == [4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_bucket_leaves_as_soon_as_it_and_those_before_it_are_full(comm, stage):
    reducer, _, params = make(stage)
    give(reducer, params, {"c": 3.0, "b": 2.0})
    assert comm.names() == []
    give(reducer, params, {"d": 4.0})
    assert comm.names().count("reduce_scatter") == 3
    assert all(params[fqn].grad is None for fqn in "bcd"), "reduced gradients are freed during backward"


@pytest.mark.parametrize("stage", [0, 1])
def test_nothing_is_sent_before_the_boundary(comm, stage):
    reducer, shard, params = make(stage)
    give(reducer, params, ALL)
    reducer.finish_backward(boundary=False)
    assert comm.log == []
    give(reducer, params, ALL)
    reducer.finish_backward(boundary=True)
    result, _ = reducer.take(shard)
    assert len([name for name in comm.names() if name != "wait"]) == 4, "micro steps are summed before they are sent"
    assert by_name(shard, result) == {fqn: {2 * value} for fqn, value in ALL.items()}


@pytest.mark.parametrize("stage", [2, 3])
def test_every_micro_step_is_reduced_and_added(comm, stage):
    reducer, shard, params = make(stage)
    for number in range(3):
        give(reducer, params, ALL)
        reducer.finish_backward(boundary=number == 2)
    result, _ = reducer.take(shard)
    assert comm.names().count("reduce_scatter") == 12
    assert by_name(shard, result) == {fqn: {3 * value} for fqn, value in ALL.items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("given", [{"c": 3.0}, {}], ids=["one", "none"])
def test_a_parameter_without_a_gradient_is_sent_as_zeros(comm, stage, given):
    reducer, shard, params = make(stage)
    give(reducer, params, given)
    reducer.finish_backward(boundary=True)
    result, touched = reducer.take(shard)
    assert len([name for name in comm.names() if name != "wait"]) == 4
    assert by_name(shard, result) == {fqn: {given.get(fqn, 0.0)} for fqn in SHAPES}
    assert touched == {params[fqn] for fqn in given}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_micro_step_without_a_gradient_keeps_the_earlier_one(comm, stage):
    reducer, shard, params = make(stage)
    give(reducer, params, {"a": 1.0, "c": 3.0})
    reducer.finish_backward(boundary=False)
    give(reducer, params, {"d": 4.0, "c": 3.0})
    reducer.finish_backward(boundary=True)
    result, touched = reducer.take(shard)
    assert by_name(shard, result) == {"a": {1.0}, "b": {0.0}, "c": {6.0}, "d": {4.0}}
    assert touched == {params["a"], params["c"], params["d"]}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_second_gradient_in_one_backward_is_refused(comm, stage):
    reducer, _, params = make(stage)
    give(reducer, params, {"d": 4.0})
    with pytest.raises(RuntimeError, match=r"^d: a second gradient in one backward.*use_reentrant=False"):
        give(reducer, params, {"d": 4.0})


@pytest.mark.parametrize("stage", [2, 3])
def test_the_next_backward_may_bring_it_again(comm, stage):
    reducer, shard, params = make(stage)
    for _ in range(2):
        give(reducer, params, {"d": 4.0})
        reducer.finish_backward(boundary=True)
    assert by_name(shard, reducer.take(shard)[0])["d"] == {8.0}


def test_a_gradient_of_an_inactive_parameter_is_refused(comm):
    reducer, _, _ = make(2)
    stranger = torch.nn.Parameter(torch.zeros(1))
    stranger.grad = torch.zeros(1)
    with pytest.raises(RuntimeError, match="whose block is not active"):
        reducer.on_gradient(stranger)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_take_ends_the_window(comm, stage):
    reducer, shard, params = make(stage)
    for value in (1.0, 5.0):
        give(reducer, params, dict.fromkeys(ALL, value))
        reducer.finish_backward(boundary=True)
        result, _ = reducer.take(shard)
        assert by_name(shard, result) == {fqn: {value} for fqn in SHAPES}
    result, touched = reducer.take(shard)
    assert touched == set()
    assert not result.any()
    assert result.numel() == shard.numel


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_discard_drops_whole_and_reduced_gradients(comm, stage):
    reducer, shard, params = make(stage, dtype=torch.bfloat16, accumulation=torch.float32)
    give(reducer, params, ALL)
    reducer.finish_backward(boundary=False)
    give(reducer, params, {"d": 4.0})
    reducer.discard()
    assert all(param.grad is None for param in params.values())
    give(reducer, params, ALL)
    reducer.finish_backward(boundary=True)
    assert by_name(shard, reducer.take(shard)[0]) == {fqn: {value} for fqn, value in ALL.items()}


@pytest.mark.parametrize(("overlap", "most"), [(False, 0), (True, gradients.MAX_IN_FLIGHT)])
def test_overlap_bounds_the_buckets_in_flight(comm, overlap, most):
    reducer, _, params = make(2, overlap=overlap)
    give(reducer, params, {"d": 4.0, "c": 3.0, "b": 2.0})
    names = comm.names()
    assert names.count("reduce_scatter") - names.count("wait") == most
    reducer.finish_backward(boundary=True)
    assert [entry[1] for entry in comm.log if entry[0] == "wait"] == [0, 1, 2, 3]


@pytest.mark.parametrize(("bucket_numel", "collectives"), [(0, 4), (64, 2), (10**6, 1)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_reduce_bucket_size_sets_the_number_of_collectives(comm, stage, bucket_numel, collectives):
    # A slot is 16 elements: two of them over two ranks are 64 elements on the wire, four at stage 0.
    reducer, shard, params = make(stage, bucket_numel=bucket_numel // 2 if stage == 0 else bucket_numel)
    give(reducer, params, ALL)
    reducer.finish_backward(boundary=True)
    assert len([name for name in comm.names() if name != "wait"]) == collectives
    assert by_name(shard, reducer.take(shard)[0]) == {fqn: {value} for fqn, value in ALL.items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_accumulation_of_bf16_gradients_keeps_what_bf16_would_lose(comm, stage):
    for accumulation, expected in ((torch.float32, 1.0 + 2**-9), (torch.bfloat16, 1.0)):
        fp32 = torch.float32
        reducer, shard, params = make(stage, dtype=torch.bfloat16, accumulation=accumulation, communication=fp32)
        give(reducer, params, dict.fromkeys(ALL, 1.0))
        reducer.finish_backward(boundary=False)
        give(reducer, params, dict.fromkeys(ALL, 2**-9))
        reducer.finish_backward(boundary=True)
        result, _ = reducer.take(shard)
        assert result.dtype == accumulation
        assert by_name(shard, result) == {fqn: {expected} for fqn in SHAPES}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_rank_gets_its_own_slice(comm, stage):
    reducer, shard, params = make(stage, rank=1)
    comm.rank = 1
    params["a"].grad = torch.arange(15.0).view(5, 3)
    reducer.on_gradient(params["a"])
    reducer.finish_backward(boundary=True)
    result, _ = reducer.take(shard)
    segment = shard.segments[shard.fqns.index("a")]
    values = result[segment.offset : segment.offset + segment.numel].tolist()
    assert values == list(range(15)) if stage == 0 else values == list(range(8, 15))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_lone_rank_sends_nothing_and_frees_each_gradient_at_once(comm, stage):
    reducer, shard, params = make(stage, world=1)
    give(reducer, params, {"b": 2.0, "d": 4.0})
    assert params["b"].grad is params["d"].grad is None
    reducer.finish_backward(boundary=True)
    assert comm.log == []
    result, touched = reducer.take(shard)
    assert by_name(shard, result) == {"a": {0.0}, "b": {2.0}, "c": {0.0}, "d": {4.0}}
    assert touched == {params["b"], params["d"]}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_lone_rank_adds_gradients_that_come_without_a_reduction_between(comm, stage):
    """engine.no_sync() at stages 0 and 1; reentrant checkpointing of a shared parameter at any."""
    reducer, shard, params = make(stage, world=1, dtype=torch.bfloat16, accumulation=torch.float32)
    give(reducer, params, dict.fromkeys(ALL, 1.0))
    give(reducer, params, dict.fromkeys(ALL, 2**-9))
    reducer.finish_backward(boundary=True)
    assert by_name(shard, reducer.take(shard)[0]) == {fqn: {1.0 + 2**-9} for fqn in SHAPES}


def test_opening_another_block_closes_the_one_before(comm):
    reducer, _, params = make(2)
    other = torch.nn.Parameter(torch.zeros(3))
    reducer.open([UnitShard([("other", other)], {"other": 0}, WORLD, 0)])
    params["a"].grad = torch.zeros(5, 3)
    with pytest.raises(RuntimeError, match="not active"):
        reducer.on_gradient(params["a"])


def test_sum_of_squares_of_a_large_shard_keeps_six_digits():
    flat = torch.randn(NORM_ROW * 1500 + 37, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = flat.double().square().sum().item()
    assert abs(sum_of_squares(flat).item() - exact) < 1e-6 * exact


def test_sum_of_squares_of_few_or_no_elements_is_exact():
    assert sum_of_squares(torch.tensor([3.0, 4.0])).item() == 25.0
    assert sum_of_squares(torch.empty(0)).item() == 0.0


def test_sum_of_squares_shows_a_single_inf_or_nan():
    for value in (float("inf"), float("nan")):
        for place in (0, NORM_ROW, NORM_ROW + 3):
            flat = torch.ones(NORM_ROW + 5)
            flat[place] = value
            assert not torch.isfinite(sum_of_squares(flat))
