"""`hift.update` "backward": the bits of "step", one unit's gradient at a time, and what happens half way."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT
from deepspeed.utils import safe_get_full_optimizer_state
from hift_testing import tolerances
from hift_testing.contestants import data, loss_of
from hift_testing.disturbed import Fused, branch_steps, poison_next_gradient, ranks_disagree
from hift_testing.fingerprints import all_by_block, changed, digest_of, weights_by_block
from hift_testing.messages import error_of, logged
from hift_testing.parity import agree, batch, build
from hift_testing.selection import diagonal, slow
from hift_testing.training import (
    batch_of,
    ds_config,
    engine_of,
    largest_difference,
    run_steps,
    small_llama,
    whole_weights,
)
from torch import nn

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)
DTYPES = ("fp32", "bf16")
BACKWARD = {"update": "backward", "layers_per_block": 100}
PAIR = {"update": "backward", "layers_per_block": 3}


# The same bits as updates in the step, whose own parity is held elsewhere.


def both_ways(
    stage: int, dtype: str, hift: dict[str, Any], family: str | None = None, steps: int = 5, **extra: Any
) -> None:
    """Training with updates in backward and in the step leaves the same weights, state, losses and norms."""
    found = []
    for update in ("backward", "step"):
        model = small_llama() if family is None else build(family)
        engine = engine_of(ds_config(stage, dtype, {**hift, "update": update}, **extra), model)
        losses, norms = [], []
        for step in range(steps):
            for micro in range(engine.gradient_accumulation_steps()):
                rows = batch_of(step, micro, dist.get_rank()) if family is None else batch(
                    family, step, micro, dist.get_rank())  # fmt: skip
                loss = engine(**rows).loss
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            norms.append(float(engine.get_global_grad_norm()))
        found.append((all_by_block(engine), losses, norms))
        engine.destroy()
    assert changed(found[0][0], found[1][0]) == []
    assert found[0][1] == found[1][1]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-6)


FORMS = {
    "rounding": {"layers_per_block": 2, "kernel": "triton", "state": {"master": "none", "moments": "bf16"}},
    "compact": {"layers_per_block": 6, "state": {"master": "split16", "moments": "int8"}},
}
ADAFACTOR = {"type": "Adafactor", "params": {"lr": 1e-2}}
CASES = [
    (0, "fp32", {"layers_per_block": 2}, {}),
    (1, "bf16", {"layers_per_block": 4, "order": "random"}, {}),
    (2, "bf16", {"layers_per_block": 3, "always_active": ["norm"]}, {}),
    (3, "fp32", {"layers_per_block": 3, "order": "top2down"}, {}),
    (2, "fp32", {"layers_per_block": 3, "steps_per_block": 2, "inactive_state": "reset"}, {}),
    (1, "bf16", {"layers_per_block": 3}, {"gradient_accumulation_steps": 3}),
    (0, "fp32", {"layers_per_block": 3}, {"gradient_accumulation_steps": 2}),
    (3, "bf16", {"layers_per_block": 3}, {"gradient_accumulation_steps": 2}),
    (2, "bf16", FORMS["compact"], {}),
    (1, "bf16", FORMS["rounding"], {}),
    (2, "bf16", {"layers_per_block": 3}, {"optimizer": ADAFACTOR}),
    (1, "bf16", {"blocks": [["layers.[02]", "embed"], ["layers.[13]", "^model.norm", "lm_head"]]}, {}),
]


@pytest.mark.parametrize(("stage", "dtype", "hift", "extra"), CASES)
def test_updates_in_backward_leave_the_bits_of_updates_in_the_step(two_ranks, stage, dtype, hift, extra):
    two_ranks.run(both_ways, stage, dtype, hift, **extra)


ALONE = (0, "fp32", {"layers_per_block": 3, "order": "bottom2up", "always_active": ["lm_head"]}, {})


@pytest.mark.parametrize(("stage", "dtype", "hift", "extra"), [*CASES[:3], *CASES[5:10], ALONE])
def test_a_lone_rank_s_updates_in_backward_leave_the_bits_of_updates_in_the_step(one_rank, stage, dtype, hift, extra):
    one_rank.run(both_ways, stage, dtype, hift, **extra)


@pytest.mark.parametrize(("family", "stage"), diagonal(("gpt2", "mixtral", "t5", "bert", "moe"), (0, 2)))
def test_every_family_has_the_bits_of_updates_in_the_step(two_ranks, family, stage):
    two_ranks.run(both_ways, stage, "fp32", {"layers_per_block": 3}, family, steps=3)


@pytest.mark.parametrize(("stage", "dtype"), diagonal(STAGES, DTYPES))
def test_one_block_equals_full_fine_tuning_in_plain_torch(two_ranks, stage, dtype):
    weights = tolerances.STAGE3 if stage == 3 and dtype == "fp32" else tolerances.EXACT
    agree(two_ranks, stage, dtype, BACKWARD, blocks=1, weights=weights)


@pytest.mark.parametrize("stage", (0, slow(1), 2, 3))
def test_groups_and_checkpointing_and_tied_weights_equal_plain_torch(two_ranks, stage):
    agree(two_ranks, stage, "fp32", BACKWARD, blocks=1, groups=True, weights=tolerances.STAGE3)
    two_ranks.run(checkpointed_and_tied, stage)


def checkpointed_and_tied(stage: int) -> None:
    """A tied model, whose embedding's gradient is whole at the very end, with recomputed layers."""
    weights = []
    for update, checkpointing in (("backward", True), ("step", False)):
        model = small_llama(tied=True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        engine = engine_of(ds_config(stage, "fp32", {**BACKWARD, "update": update}), model.train())
        run_steps(engine, 3)
        weights.append(whole_weights(engine))
    assert largest_difference(*weights) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_made_under_zero_init_trains_as_plain_torch(two_ranks, dtype):
    weights = tolerances.STAGE3 if dtype == "fp32" else tolerances.EXACT
    agree(two_ranks, 3, dtype, BACKWARD, blocks=1, zero_init=True, weights=weights)


class Shared(torch.nn.Module):
    """One layer at two places, and between them another: its gradient is whole when the lower use has been passed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
        self.layers[3] = self.layers[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def shared_layers(stage: int) -> None:
    weights = []
    for update in ("backward", "step"):
        engine = engine_of(ds_config(stage, "fp32", {**BACKWARD, "update": update}), Shared())
        for step in range(4):
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            engine.backward(engine(torch.randn(2, 16, generator=generator)))
            engine.step()
        weights.append(all_by_block(engine))
    assert changed(*weights) == []


@pytest.mark.parametrize("stage", (0, 2, 3))
def test_a_layer_that_is_used_twice_is_updated_once_with_its_whole_gradient(two_ranks, one_rank, stage):
    for ranks in (two_ranks, one_rank):
        ranks.run(shared_layers, stage)


class UsedUnderDetach(torch.nn.Module):
    """A layer's weights once more, without a gradient for them, lower in the graph than their own use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        upper = self.layers[1]
        x = torch.nn.functional.linear(torch.tanh(self.layers[0](x)), upper.weight.detach())
        return torch.tanh(self.layers[2](upper(torch.tanh(x)))).square().mean()


def used_under_detach(stage: int, right: bool) -> None:
    """Backward goes through weights that it has updated: never with the new ones."""
    found = []
    for update in ("step", "backward"):
        engine = engine_of(ds_config(stage, "fp32", {**BACKWARD, "update": update}), UsedUnderDetach())
        rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
        loss = engine(rows)
        if update == "step" or right:
            engine.backward(loss)
            engine.step()
            found.append(all_by_block(engine))
        else:
            assert "needs weights that are updated already" in error_of(partial(engine.backward, loss))
            assert "load a checkpoint" in error_of(engine.step)
    assert changed(found[0], found[-1]) == []


@pytest.mark.parametrize("stage", (0, 2, 3))
def test_a_backward_never_goes_through_weights_that_it_has_updated(two_ranks, one_rank, stage):
    two_ranks.run(used_under_detach, stage, stage == 3)  # whose backward has gathered copies of its own
    one_rank.run(used_under_detach, stage, False)


# One unit at a time.


def alone_at_each_update(stage: int) -> None:
    """When a unit is updated no other unit has a gradient, and all of them are updated before `step`."""
    engine = engine_of(ds_config(stage, "fp32", BACKWARD))
    optimizer, seen = engine.optimizer, []
    give, plan = optimizer.reducer._give, engine.block_plan.blocks[0]

    def watched(shard: Any) -> None:
        own = set(shard.params)
        others = [name for name, p in engine.module.named_parameters() if p.grad is not None and p not in own]
        seen.append((shard.fqns, others))
        give(shard)

    optimizer.reducer._give = watched
    engine.backward(engine(**batch_of(0, 0, dist.get_rank())).loss)
    assert [fqns for fqns, _ in seen] == [unit.fqns for unit in reversed(plan.units)]
    assert all(not others for _, others in seen), seen
    engine.step()
    assert len(seen) == len(plan.units)


@pytest.mark.parametrize("stage", STAGES)
def test_no_other_unit_s_gradient_is_alive_when_one_is_updated(two_ranks, one_rank, stage):
    for ranks in (two_ranks, one_rank):
        ranks.run(alone_at_each_update, stage)


def whole_after_backward(stage: int) -> None:
    """Nothing is on its way when backward has ended: a forward or a save before `step` finds the new weights."""
    engine = engine_of(ds_config(stage, "fp32", BACKWARD, zero_optimization={"allgather_bucket_size": 500}))
    before = whole_weights(engine)
    engine.backward(engine(**batch_of(0, 0, dist.get_rank())).loss)
    after = whole_weights(engine)
    with torch.no_grad():
        loss = engine(**batch_of(0, 0, dist.get_rank())).loss
    engine.step()
    assert largest_difference(after, whole_weights(engine)) == 0.0
    assert all(not torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(loss, engine(**batch_of(0, 0, dist.get_rank())).loss)


@pytest.mark.parametrize("stage", (1, 2))
def test_when_backward_has_ended_its_new_weights_are_everywhere(two_ranks, stage):
    two_ranks.run(whole_after_backward, stage)


def gradient_itself_is_read() -> None:
    """A lone rank makes no second copy of a large parameter's gradient: the update sees `.grad`'s own memory."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(3)))
    engine = engine_of(ds_config(0, "fp32", BACKWARD), layers)
    update, places = engine.optimizer._step.update, []
    run = update.run

    def watched(state: Any, grad: Any, *args: Any) -> torch.Tensor:
        own = state.shard.params[0].grad
        places.append(grad[slice(0, own.numel())].data_ptr() == own.data_ptr())
        return run(state, grad, *args)

    update.run = watched
    engine.backward(engine(torch.ones(2, 64)).square().mean())
    assert places == [True] * 3


def test_a_lone_rank_s_update_reads_the_gradient_where_autograd_has_left_it(one_rank):
    one_rank.run(gradient_itself_is_read)


class Positions(nn.Module):
    """The gradient of what it adds is a view of its output's, which backward still hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight.unsqueeze(0)


def gradients_share_memory(optimizer: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 64), Positions(), nn.Linear(64, 20))
    plain, ids = copy.deepcopy(model), torch.arange(8).unsqueeze(0)
    reference = getattr(torch.optim, optimizer["type"])(plain.parameters(), **optimizer["params"])
    engine = engine_of(ds_config(0, "fp32", BACKWARD, optimizer=optimizer, train_micro_batch_size_per_gpu=1), model)
    for _ in range(3):
        engine.backward(engine(ids).square().mean())
        engine.step()
        reference.zero_grad()
        plain(ids).square().mean().backward()
        reference.step()
    assert largest_difference(whole_weights(engine), dict(plain.named_parameters())) < 1e-6


@pytest.mark.parametrize("optimizer", [
    {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1}},
    {"type": "SGD", "params": {"lr": 1.0, "weight_decay": 0.1}},
], ids=lambda optimizer: optimizer["type"])  # fmt: skip
def test_an_update_leaves_a_gradient_that_backward_still_needs(one_rank, optimizer):
    one_rank.run(gradients_share_memory, optimizer)


# What goes wrong.


def left_out(stage: int, value: float, kernel: str) -> None:
    """One unit's gradient is not finite on one rank: it alone stays as it was, on all ranks, and a warning says so."""
    engine = engine_of(ds_config(stage, "bf16", {**BACKWARD, "kernel": kernel}))
    run_steps(engine, 1)
    before = [digest_of({"": str([t.tolist() for t in state.tensors.values()])}) for state in engine.optimizer.states]
    weights = whole_weights(engine)
    poison_next_gradient(engine, value)
    with logged("hift_ds.zero") as warnings:
        run_steps(engine, 1, start=1)
        engine.optimizer.settle()
    after = [digest_of({"": str([t.tolist() for t in state.tensors.values()])}) for state in engine.optimizer.states]
    poisoned = engine.block_plan.blocks[0].units[-1]
    assert [state.step for state in engine.optimizer.states] == [1, 2, 2, 2, 2, 2]
    assert [one != other for one, other in zip(before, after, strict=True)] == [False, True, True, True, True, True]
    now = whole_weights(engine)
    same = {name for name in weights if torch.equal(weights[name], now[name])}
    assert set(poisoned.fqns) <= same and not same.intersection(engine.block_plan.blocks[0].units[1].fqns)
    assert any("gradient of 'model.norm.weight'" in text and "its update was left out" in text for text in warnings)
    assert not torch.isfinite(torch.tensor(float(engine.get_global_grad_norm())))
    run_steps(engine, 1, start=2)
    assert engine.optimizer.states[0].step == 2


@pytest.mark.parametrize(
    ("stage", "value", "kernel"), [(0, float("nan"), "torch"), (2, float("inf"), "triton"), (3, float("inf"), "torch")]
)
def test_a_unit_whose_gradient_is_not_finite_is_left_out_alone(two_ranks, stage, value, kernel):
    two_ranks.run(left_out, stage, value, kernel)


def interrupted(stage: int, folder: str) -> None:
    """A backward ends with an error when two of four units are updated: nothing goes on until a checkpoint is loaded,
    and then the run is the one without the error."""

    def train(engine: Any, step: int) -> None:
        engine.backward(loss_of(engine(data(step))))
        engine.step()

    weights = []
    for fails in (False, True):
        model = Fused(0)
        engine = engine_of(ds_config(stage, "fp32", BACKWARD), model)
        for step in range(2):
            train(engine, step)
        engine.save_checkpoint(folder)
        if fails:
            model.switch[0] = True
            assert "out of memory" in error_of(partial(train, engine, 2))
            model.switch[0] = False
            for ask in (partial(train, engine, 2), engine.step, partial(engine.save_checkpoint, folder)):
                error = error_of(ask)
                assert "ended with an error half way" in error and "load a checkpoint" in error, error
            engine.load_checkpoint(folder)
        for step in range(2, 5):
            train(engine, step)
        weights.append(whole_weights(engine))
    assert largest_difference(*weights) == 0.0


def loaded_at_once(stage: int, folder: str) -> None:
    """As above, without anything between the error and the load; of everything and of weights alone."""
    model, weights = Fused(0), []
    engine = engine_of(ds_config(stage, "fp32", BACKWARD), model)
    engine.backward(loss_of(engine(data(0))))
    engine.step()
    engine.save_checkpoint(folder)
    for fails, load in ((False, {}), (True, {}), (True, {"load_module_only": True})):
        engine.load_checkpoint(folder)
        if fails:
            model.switch[0] = True
            assert "out of memory" in error_of(lambda: engine.backward(loss_of(engine(data(7)))))
            model.switch[0] = False
            engine.load_checkpoint(folder, **load)
        for step in range(1, 4):
            engine.backward(loss_of(engine(data(step))))
            engine.step()
        weights.append(whole_weights(engine))
    assert largest_difference(*weights[:2]) == 0.0


@pytest.mark.parametrize("stage", (0, 2, 3))
def test_a_load_right_after_a_backward_that_ended_half_way_is_enough(two_ranks, tmp_path, stage):
    two_ranks.run(loaded_at_once, stage, str(tmp_path))


def saved_between(folder: str) -> None:
    """The update is made and not counted: resumed from there it would be made twice."""
    engine = engine_of(ds_config(2, "fp32", PAIR))
    engine.backward(engine(**batch_of(0, 0, dist.get_rank())).loss)
    for ask in (lambda: engine.save_checkpoint(folder), engine.optimizer.state_dict):
        assert "call engine.step() before a save" in error_of(ask)
    engine.step()
    engine.save_checkpoint(folder)


def test_a_save_between_backward_and_step_is_refused(two_ranks, tmp_path):
    two_ranks.run(saved_between, str(tmp_path))


@pytest.mark.parametrize("stage", (0, 2, 3))
def test_after_a_backward_that_ends_half_way_only_a_checkpoint_goes_on(two_ranks, tmp_path, stage):
    two_ranks.run(interrupted, stage, str(tmp_path))


def interrupted_at_once() -> None:
    """An error before the first unit is updated drops the window, as with updates in the step."""
    model = Fused(2)
    engine = engine_of(ds_config(0, "fp32", {"update": "backward", "order": "bottom2up", "frozen": ["head"]}), model)
    model.switch[0] = True
    assert "out of memory" in error_of(lambda: engine.backward(loss_of(engine(data(0)))))
    model.switch[0] = False
    engine.backward(loss_of(engine(data(0))))
    engine.step()
    assert engine.hift.active_block == 1


def test_an_error_before_the_first_update_costs_its_window_alone(one_rank):
    one_rank.run(interrupted_at_once)


def second_backward(stage: int) -> None:
    engine = engine_of(ds_config(stage, "fp32", BACKWARD))
    rows = batch_of(0, 0, dist.get_rank())
    losses = [engine(**rows).loss for _ in range(2)] if stage < 3 else [engine(**rows).loss]
    engine.backward(losses[0])
    error = error_of(lambda: engine.backward(losses[-1] if stage < 3 else engine(**rows).loss))
    assert "the update of this window is made" in error, error


@pytest.mark.parametrize("stage", (0, 2, 3))
def test_a_second_backward_in_the_last_micro_step_is_refused(two_ranks, stage):
    two_ranks.run(second_backward, stage)


def second_in_no_sync() -> None:
    engine = engine_of(ds_config(1, "fp32", BACKWARD))
    rows = batch_of(0, 0, dist.get_rank())
    engine.backward(engine(**rows).loss)
    with engine.no_sync():
        error = error_of(lambda: engine.backward(engine(**rows).loss))
    assert "a second gradient, and the update of this window is made" in error, error


def test_a_second_backward_in_no_sync_is_refused_and_not_lost(two_ranks):
    two_ranks.run(second_in_no_sync)


def switched_off(update: str) -> None:
    """A parameter of the active block that asks for no gradient counts as zero, whenever that was said."""
    for after_forward in (False, True):
        engine = engine_of(ds_config(2, "fp32", {**BACKWARD, "update": update}))
        param = list(engine.module.parameters())[5]
        before = whole_weights(engine)
        with logged("hift_ds.zero") as warnings:
            if not after_forward:
                param.requires_grad_(False)
            loss = engine(**batch_of(0, 0, dist.get_rank())).loss
            param.requires_grad_(False)
            engine.backward(loss)
            engine.step()
        moved = [n for n, weight in whole_weights(engine).items() if not torch.equal(weight, before[n])]
        assert len(moved) == len(before), "by weight decay, where there is no gradient"
        assert any("requires_grad was set to False" in text for text in warnings)


@pytest.mark.parametrize("update", ("step", "backward"))
def test_a_parameter_that_is_switched_off_in_its_turn_counts_as_zero(one_rank, two_ranks, update):
    one_rank.run(switched_off, update)
    two_ranks.run(switched_off, update)


def zeroed() -> None:
    engine = engine_of(ds_config(0, "fp32", BACKWARD))
    engine.backward(engine(**batch_of(0, 0, dist.get_rank())).loss)
    for zero_grad in (engine.zero_grad, engine.module.zero_grad, engine.optimizer.zero_grad):
        assert "call engine.step() first" in error_of(zero_grad)
    engine.step()
    engine.zero_grad()
    run_steps(engine, 1, start=1)
    assert {state.step for state in engine.optimizer.states} == {2}


def test_zero_grad_cannot_drop_an_update_that_is_made_and_says_so(two_ranks):
    """Else an adversarial or a generator's backward through the model would train it without a word."""
    two_ranks.run(zeroed)


@pytest.mark.parametrize("stage", (0, slow(1), 2))
def test_branches_that_ranks_do_not_share_count_as_zero_and_nobody_waits(two_ranks, stage):
    hift = {"update": "backward", "blocks": [["layers"]]}
    first, second = two_ranks.run(branch_steps, stage, (1, 2), 3, hift)
    assert first["error"] == "" and first["digest"] == second["digest"]
    assert first["counts"] == [3] * len(first["counts"])


def unreached(stage: int, hift: dict[str, Any]) -> Any:
    return branch_steps(stage, (1, 1), 3, {"update": "backward", **hift})


@pytest.mark.parametrize("stage", (0, 2))
def test_a_block_that_no_rank_reaches_is_an_error_or_is_skipped_as_ever(two_ranks, stage):
    for result in two_ranks.run(unreached, stage, {}):
        assert "block 2" in result["error"] and "received no gradient on any rank" in result["error"]
        assert "2" not in result["changed"]
    for result in two_ranks.run(unreached, stage, {"no_gradient": "skip"}):
        assert result["error"] == "" and result["counts"] == [1, 1, 0]


@pytest.mark.parametrize("stage", (0, 2))
def test_ranks_that_disagree_on_the_block_change_nothing(two_ranks, stage):
    two_ranks.run(ranks_disagree, stage, {"update": "backward"})


# Clipping, resuming, reading.


def bounds_in_force() -> None:
    """`engine.gradient_clipping()` where the key is not written: off, which is not DeepSpeed's default."""
    for hift, bound in ((BACKWARD, 0.0), ({**BACKWARD, "update": "step"}, GRADIENT_CLIPPING_DEFAULT)):
        config = ds_config(2, "fp32", hift)
        config.pop("gradient_clipping", None)
        assert engine_of(config).gradient_clipping() == bound


def test_the_engine_says_which_bound_is_in_force(two_ranks):
    two_ranks.run(bounds_in_force)


def clipped_by_unit(stage: int, clip: float) -> None:
    """Each unit is clipped by its own norm: SGD moves it by rate times its gradient over max(1, norm / clip)."""
    config = ds_config(stage, "fp32", {**BACKWARD, "clip": "unit"}, gradient_clipping=clip)
    config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
    engine = engine_of(config)
    before = whole_weights(engine)
    plain = small_llama()
    for rank in range(dist.get_world_size()):
        (plain(**batch_of(0, 0, rank)).loss / dist.get_world_size()).backward()
    grads = {name: param.grad for name, param in plain.named_parameters()}
    run_steps(engine, 1)
    after, norms = whole_weights(engine), []
    for unit in engine.block_plan.blocks[0].units:
        norm = torch.cat([grads[fqn].view(-1) for fqn in unit.fqns]).norm()
        norms.append(norm.item())
        for fqn in unit.fqns:
            moved = 0.1 * grads[fqn] / max(1.0, (norm + 1e-6) / clip)
            assert torch.allclose(before[fqn] - moved, after[fqn], rtol=1e-5, atol=1e-7), fqn
    assert min(norms) < clip < max(norms), "some are clipped, some are not"
    assert float(engine.get_global_grad_norm()) == pytest.approx(sum(norm**2 for norm in norms) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("stage", (0, 2, 3))
def test_a_unit_is_clipped_by_its_own_norm(two_ranks, stage):
    two_ranks.run(clipped_by_unit, stage, 0.5)


def resumed(stage: int, updates: tuple[str, str], folder: str) -> None:
    """Five steps, of which the last three are another engine's, with updates made in another way."""
    weights = []
    for split in (False, True):
        engine = engine_of(ds_config(stage, "bf16", {**PAIR, "update": updates[0]}))
        run_steps(engine, 2)
        if split:
            engine.save_checkpoint(folder)
            engine = engine_of(ds_config(stage, "bf16", {**PAIR, "update": updates[1]}), small_llama(seed=1))
            engine.load_checkpoint(folder)
        run_steps(engine, 3, start=2)
        weights.append(weights_by_block(engine))
    assert changed(*weights) == []


@pytest.mark.parametrize(
    ("stage", "updates"), [(0, ("backward", "step")), (2, ("backward", "backward")), (3, ("step", "backward"))]
)
def test_a_checkpoint_goes_on_whichever_way_updates_are_made(two_ranks, tmp_path, stage, updates):
    two_ranks.run(resumed, stage, updates, str(tmp_path))


# Gradients of earlier micro steps on the host.


def accumulated(stage: int, dtype: str, layers_per_block: int) -> None:
    """Three micro steps: on the host as on the device, but for the order of sums; nothing is left on the device between
    them."""
    found = []
    for accumulate in ("host", "device"):
        hift = {"update": "backward", "layers_per_block": layers_per_block, "accumulate": accumulate}
        config = ds_config(stage, dtype, hift, gradient_accumulation_steps=3)
        config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
        engine = engine_of(config)
        for step in range(4):
            for micro in range(3):
                engine.backward(engine(**batch_of(step, micro, dist.get_rank())).loss)
                held = [t.numel() for t in engine.optimizer.reducer.tensors()]
                held += [param.grad.numel() for param in engine.module.parameters() if param.grad is not None]
                assert accumulate == "device" or held == [], held
                engine.step()
        found.append(whole_weights(engine))
    assert largest_difference(found[1], dict(small_llama().named_parameters())) > 1e-3
    assert largest_difference(*found) <= (2e-7 if dtype == "fp32" else 2e-2)


@pytest.mark.parametrize(
    ("stage", "dtype", "layers"), [(0, "fp32", 2), (1, "fp32", 100), (2, "bf16", 3), (3, "fp32", 100)]
)
def test_gradients_that_wait_on_the_host_add_up_as_on_the_device(two_ranks, one_rank, stage, dtype, layers):
    for ranks in (two_ranks, one_rank):
        ranks.run(accumulated, stage, dtype, layers)


def dropped_on_the_host() -> None:
    """`zero_grad` in the middle of a window drops what waits on the host, too."""
    weights = []
    for disturbed in (False, True):
        hift = {**BACKWARD, "accumulate": "host"}
        engine = engine_of(ds_config(0, "fp32", hift, gradient_accumulation_steps=2))
        if disturbed:
            engine.backward(engine(**batch_of(9, 9, dist.get_rank())).loss)
            engine.zero_grad()
        run_steps(engine, 2)
        weights.append(whole_weights(engine))
    assert largest_difference(*weights) == 0.0


def test_zero_grad_drops_what_waits_on_the_host(two_ranks):
    two_ranks.run(dropped_on_the_host)


def read(stage: int) -> None:
    engine = engine_of(ds_config(stage, "fp32", BACKWARD))
    run_steps(engine, 2)
    for param in engine.module.parameters():
        assert safe_get_full_optimizer_state(param, "exp_avg").abs().sum() > 0
    assert engine.get_lr() == [1e-3] and engine.global_steps == 2


@pytest.mark.parametrize("stage", (0, 3))
def test_state_is_read_as_ever(two_ranks, stage):
    two_ranks.run(read, stage)
