"""Ideas of DeepSpeed's own unit tests, through our engine."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from hift_testing.contestants import (
    HYPER,
    Stack,
    assert_near,
    data,
    hift_engine,
    loss_of,
    on,
    pair,
    plain_engine,
    run,
    train_step,
)
from hift_testing.training import largest_difference, whole_weights
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)


def full_parameters(stage: int, dtype: str) -> None:
    """Masters and moments of all parameters, read and written through deepspeed.utils, beside the oracle's."""
    engine, oracle = pair(Stack, stage, dtype)
    run(train_step, 4, engine, oracle)
    named = dict(engine.module.named_parameters())
    start = whole_weights(oracle)
    owner = {name: rule for block, rule in zip(oracle.blocks, oracle.rules, strict=True) for name in block}
    for name, param in named.items():
        master, state = oracle.masters[name], owner[name].state[oracle.masters[name]]
        bound = 1e-5 if dtype == "fp32" else 1e-2
        assert (safe_get_full_fp32_param(param) - master).abs().max() <= bound, name
        for slot in ("exp_avg", "exp_avg_sq"):
            assert (safe_get_full_optimizer_state(param, slot) - state[slot]).abs().max() <= bound, (slot, name)
    for name, param in named.items():
        values = oracle.masters[name].detach() * 0.5 + 0.01
        safe_set_full_fp32_param(param, values)
        oracle.masters[name].data.copy_(values)
        oracle.named[name].data.copy_(values)
        safe_set_full_optimizer_state(param, torch.full_like(values, 0.02), "exp_avg")
        owner[name].state[oracle.masters[name]]["exp_avg"].fill_(0.02)
    # DeepSpeed writes the master; the model's weight follows at the next update of its parameter.
    run(train_step, 6, engine, oracle, start=4)
    assert_near(engine, oracle, dtype, start=start)


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", (1, 2, 3))
def test_masters_and_moments_of_all_parameters_are_read_and_written(ranks, stage, dtype):
    on(ranks, full_parameters, stage, dtype)


def evaluate(engine: Any) -> None:
    engine.eval()
    with torch.no_grad():
        loss_of(engine(data(99)))
    engine.train()


def saved_and_loaded(stage: int, dtype: str, folder: str) -> None:
    """Save in the middle of a cycle, train on, load into a fresh engine: both end alike. Evaluation between."""
    first = hift_engine(Stack(0), stage, dtype, gas=2)
    run(train_step, 2, first)
    first.save_checkpoint(folder)
    evaluate(first)
    run(train_step, 4, first, start=2)
    fresh = hift_engine(Stack(1), stage, dtype, gas=2)
    fresh.load_checkpoint(folder)
    run(train_step, 2, fresh, start=2)
    evaluate(fresh)
    run(train_step, 2, fresh, start=4)
    assert largest_difference(whole_weights(first), whole_weights(fresh)) == 0.0


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(two_ranks, stage, dtype, tmp_path):
    on(two_ranks, saved_and_loaded, stage, dtype, str(tmp_path))


class Pair(NamedTuple):
    """A tuple with names."""

    loss: torch.Tensor
    output: torch.Tensor


class Outputs(nn.Module):
    """The loss in every kind of container that models return."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stack, self.kind = Stack(), kind

    def forward(self, x: torch.Tensor) -> Any:
        output = self.stack(x)
        loss = loss_of(output)
        if self.kind == "dict":
            return {"loss": loss, "hidden": [output, None]}
        if self.kind == "tuple":
            return loss, (output, "text"), None
        if self.kind == "namedtuple":
            return Pair(loss, output)
        return CausalLMOutput(loss=loss, logits=output)


def loss_in(output: Any) -> torch.Tensor:
    if isinstance(output, dict):
        return output["loss"]
    return output[0]


def outputs(stage: int, kind: str, torch_style: bool) -> None:
    """A forward that returns a container."""
    engine, oracle = pair(lambda: Outputs(kind), stage)
    for step in range(5):
        loss = loss_in(engine(data(step)))
        if torch_style:
            loss.backward()
        else:
            engine.backward(loss)
        engine.step()
        oracle.backward(loss_in(oracle(data(step))))
        oracle.step()
    assert_near(engine, oracle)


@pytest.mark.parametrize("torch_style", (False, True), ids=("engine.backward", "loss.backward"))
@pytest.mark.parametrize("kind", ("dict", "tuple", "namedtuple", "ModelOutput"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_in_any_container_trains(two_ranks, stage, kind, torch_style):
    on(two_ranks, outputs, stage, kind, torch_style)


def scaled_loss(stage: int) -> None:
    """`engine.backward(loss, scale_wrt_gas=False)`, as callers do who divide by themselves."""
    engine, oracle = pair(Stack, stage, gas=2)
    for step in range(4):
        for micro in range(2):
            engine.backward(loss_of(engine(data(step, micro))) / 2, scale_wrt_gas=False)
            engine.step()
        train_step(oracle, step)
    assert_near(engine, oracle)


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_the_caller_divides_is_not_divided_again(ranks, stage):
    on(ranks, scaled_loss, stage)


def plain_optimizer_state(stage: int) -> None:
    """What users read of an engine and its optimizer, plain's beside ours: types before and after steps."""
    found = {}
    for name in ("plain", "hift"):
        module = Stack()
        engine = plain_engine(module, stage) if name == "plain" else hift_engine(module, stage)
        facts = {"norm before": type(engine.get_global_grad_norm()).__name__}
        run(train_step, 2, engine)
        facts.update({
            "norm": type(engine.get_global_grad_norm()).__name__,
            "lr": engine.get_lr(),
            "groups": [sorted({*HYPER, "params"} & set(group)) for group in engine.optimizer.param_groups],
            "state": isinstance(engine.optimizer.state, dict),
            "steps": engine.global_steps, "micro": engine.micro_steps, "samples": engine.global_samples,
            "applied": engine.was_step_applied(),
        })  # fmt: skip
        found[name] = facts
    if stage == 0:  # where DeepSpeed has no norm in fp32
        found["plain"]["norm"] = "float"
    assert found["hift"] == found["plain"]


@pytest.mark.parametrize("stage", STAGES)
def test_what_users_read_of_an_engine_has_plain_deepspeeds_types(ranks, stage):
    on(ranks, plain_optimizer_state, stage)
