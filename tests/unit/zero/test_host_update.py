"""Updates on the host: what they copy through is page-locked as the state is, and is made once."""

import pytest
import torch
from hift_testing.locking import Driver

from hift_ds.config.optimizers import rule_from_config
from hift_ds.shards import UnitShard
from hift_ds.state import unit_state as state
from hift_ds.state.host_memory import HostMemory
from hift_ds.state.unit_state import Storage, make_states
from hift_ds.zero.host_update import HostUpdate
from hift_ds.zero.update import Scaling, UnitUpdate
from hift_ds.zero.weights import OwnWeights, SentWeights

CPU = torch.device("cpu")


def trained(memory: HostMemory | None, after_start=lambda: None) -> list[torch.Tensor]:
    """The weights of a large and a small block after two updates of each: on the host where there is `memory`."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(numel, generator=generator).bfloat16()) for numel in (5000, 300)]
    rule, defaults = rule_from_config("SGD", {"lr": 0.1, "momentum": 0.9})
    groups = [{**defaults, "params": params}]
    shards = [UnitShard([("weight", param)], {"weight": 0}, 1, 0) for param in params]
    storage = Storage(CPU, memory=memory, own_master=memory is not None)
    states, _ = make_states([[shard] for shard in shards], rule, groups, storage, None)
    kind = {"rule": rule, "param_groups": groups, "device": CPU, "all_reduce": lambda tensor: tensor}
    update = HostUpdate(**kind, states=states) if memory is not None else UnitUpdate(**kind, kernel="torch")
    after_start()
    for block in (0, 1, 0, 1):
        grad = torch.randn(states[block].shard.numel, generator=generator).bfloat16()
        scaling = Scaling(2.0, 0.0, 1.0, torch.ones(1, dtype=torch.float64))
        update.run(states[block], grad, OwnWeights(states[block].shard, CPU), scaling, [0.1], block)
    return [param.detach().clone() for param in params]


@pytest.mark.parametrize(("dtype", "buffers"), [(torch.bfloat16, 1), (torch.float32, 2)])
def test_gradients_are_made_fp32_in_kept_memory(monkeypatch, dtype, buffers):
    monkeypatch.setattr(state, "TILE_NUMEL", 1024)
    param = torch.nn.Parameter(torch.zeros(5000, dtype=dtype))
    rule, defaults = rule_from_config("SGD", {"lr": 0.1})
    groups, shard = [{**defaults, "params": [param]}], UnitShard([("weight", param)], {"weight": 0}, 1, 0)
    states, _ = make_states([[shard]], rule, groups, Storage(CPU, memory=HostMemory(), own_master=True), None)
    update = HostUpdate(rule, groups, CPU, lambda tensor: tensor, states)
    grad = torch.randn(shard.numel).to(dtype)
    places = set()
    for tile, gradient in update._staging.visit(states[0].tiles, grad, SentWeights(shard, CPU)):
        assert gradient.dtype == torch.float32 and torch.equal(gradient, grad[tile.span].float())
        places.add(gradient.data_ptr())
        gradient.zero_()  # a rule uses it up
    assert len(states[0].tiles) == 5 and len(places) == buffers


@pytest.mark.parametrize("fails", [False, True])
def test_every_buffer_is_locked_at_the_start_and_none_later(monkeypatch, fails):
    monkeypatch.setattr(state, "TILE_NUMEL", 1024)
    driver, at_start = Driver(fails), []
    memory = HostMemory(driver.register, driver.unregister)
    weights = trained(memory, lambda: at_start.append((driver.attempts, sorted(driver.locked.values()))))
    assert [driver.attempts] == [attempts for attempts, _ in at_start]
    if not fails:  # two blocks' master and momentum; two buffers in and two out of a tile each
        assert at_start[0][1] == sorted([2 * 4 * 5056, 2 * 4 * 320, 4 * 4 * 1024])
    assert all(map(torch.equal, weights, trained(None)))
