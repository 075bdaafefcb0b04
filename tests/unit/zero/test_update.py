"""One update of one block: what the kernels are given."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hift_ds.config.keys import StateConfig
from hift_ds.config.optimizers import rule_from_config
from hift_ds.rules import adafactor_fused
from hift_ds.shards import UnitShard
from hift_ds.state.formats import GROUP
from hift_ds.state.unit_state import Storage, UnitState
from hift_ds.zero.unit_gradients import LoneGradient
from hift_ds.zero.update import Scaling, UnitUpdate
from hift_ds.zero.weights import OwnWeights, SentWeights

CPU = torch.device("cpu")
SCALING = Scaling(1.0, 0.0, None, torch.ones(1, dtype=torch.float64))


def seeds_of(kind: str, monkeypatch) -> dict[tuple[int, ...], int]:
    """(seed, block, rank, step, tile or run) -> the seed that the kernel draws its rounding from."""
    found: dict[tuple[int, ...], int] = {}
    rule, defaults = rule_from_config(kind, {})
    given: list[int] = []
    monkeypatch.setattr(type(rule), "update_fused", lambda self, *args: given.append(args[-1]))
    monkeypatch.setattr(adafactor_fused, "update_run", lambda *args, seed, **_: given.append(seed))
    params = {name: nn.Parameter(torch.randn(600).bfloat16()) for name in ("matrix", "norm")}
    groups = [{**defaults, "params": [param]} for param in params.values()]
    for seed, block, rank in product((0, 1), (0, 1), (0, 1)):
        shard = UnitShard(list(params.items()), {"matrix": 0, "norm": 1}, 2, rank)
        state = UnitState(shard, rule, groups, Storage(CPU), tile_numel=128)
        update = UnitUpdate(rule, groups, CPU, lambda tensor: tensor, "triton", seed=seed)
        for step in (1, 2):
            given.clear()
            update.run(state, torch.zeros(shard.numel), SentWeights(shard, CPU), SCALING, [0.1, 0.1], block)
            found |= {(seed, block, rank, step, index): value for index, value in enumerate(given)}
    return found


@pytest.mark.parametrize(("kind", "parts"), [("AdamW", 6), ("Adafactor", 2)])
def test_no_two_tiles_steps_blocks_ranks_or_seeds_round_alike(monkeypatch, kind, parts):
    """The same noise twice would be an error that does not average out."""
    found = seeds_of(kind, monkeypatch)
    assert len(found) == 2 * 2 * 2 * 2 * parts
    assert len(set(found.values())) == len(found)


def test_a_resumed_step_rounds_as_the_uninterrupted_one(monkeypatch):
    assert seeds_of("AdamW", monkeypatch) == seeds_of("AdamW", monkeypatch)


@pytest.mark.parametrize(
    ("scale", "clip", "norm", "divisor"),
    [(1.0, 0.0, 9.0, 1.0), (8.0, 0.0, 9.0, 8.0), (8.0, 3.0, 6.0, 16.0), (8.0, 3.0, 1.0, 8.0)],
)
def test_a_gradient_is_unscaled_and_clipped_only_where_its_norm_exceeds_the_bound(scale, clip, norm, divisor):
    assert Scaling(scale, clip, norm, torch.ones(1)).divisor == pytest.approx(divisor, rel=1e-6)


class Copied(TorchDispatchMode):
    """Elements that operations write."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.zero_, torch.ops.aten.zeros):
            self.numel += out.numel()
        return out


@pytest.mark.parametrize("state", [StateConfig("split16", "int8"), StateConfig()], ids=str)
def test_a_lone_rank_s_weights_and_gradients_are_updated_where_they_are(monkeypatch, state):
    """But for groups that two parameters share, or one and padding."""
    rule, defaults = rule_from_config("AdamW", {})
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(type(rule), "update_fused", lambda self, *args: given.append((args[0], args[1].weight)))
    shapes = {"up": (96, 64), "norm": (64,), "down": (64, 100), "bias": (7,)}
    params = {name: nn.Parameter(torch.randn(shape).bfloat16()) for name, shape in shapes.items()}
    for param in params.values():
        param.grad = torch.ones_like(param)
    shard = UnitShard(list(params.items()), dict.fromkeys(params, 0), 1, 0)
    groups = [{**defaults, "params": list(params.values())}]
    states = UnitState(shard, rule, groups, Storage(CPU, state), tile_numel=2048)
    update = UnitUpdate(rule, groups, CPU, lambda tensor: tensor, "triton")
    grad = LoneGradient(shard, torch.bfloat16)
    with Copied() as copied:
        update.run(states, grad, OwnWeights(shard, CPU), SCALING, [0.1], 0)
    assert sum(grad.numel() for grad, _ in given) == shard.numel
    own = {tensor.untyped_storage().data_ptr() for param in params.values() for tensor in (param, param.grad)}
    in_place = [pair[0].numel() for pair in given if {one.untyped_storage().data_ptr() for one in pair} <= own]
    assert sum(in_place) >= shard.numel - 3 * GROUP and max(in_place) == 2048
    assert copied.numel < 8 * 3 * GROUP
