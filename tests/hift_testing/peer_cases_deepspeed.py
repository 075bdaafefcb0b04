"""Cases of the peers after DeepSpeed's own unit tests: full parameters, checkpoints, outputs, what users read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from hift_testing.peer_cases import (
    HYPER,
    Stack,
    TorchHiFT,
    blocks_of,
    data,
    distance,
    hift_engine,
    loss_of,
    plain_engine,
    run,
    train_step,
    weights_of,
)
from hift_testing.training import largest_difference
from torch import nn
from transformers.modeling_outputs import CausalLMOutput


def full_parameters(stage: int, dtype: str) -> dict[str, Any]:
    """Masters and moments of all parameters, read and written through deepspeed.utils, beside the oracle's."""
    engine = hift_engine(Stack(), stage, dtype)
    oracle = TorchHiFT(Stack(), blocks_of(engine), dtype)
    run(train_step, engine, 4)
    run(train_step, oracle, 4)
    named = dict(engine.module.named_parameters())
    start, wrong = weights_of(oracle), []
    owner = {name: rule for block, rule in zip(oracle.blocks, oracle.rules, strict=True) for name in block}
    for name, param in named.items():
        master, state = oracle.masters[name], owner[name].state[oracle.masters[name]]
        bound = 1e-5 if dtype == "fp32" else 1e-2
        if (safe_get_full_fp32_param(param) - master).abs().max() > bound:
            wrong.append(name)
        for slot in ("exp_avg", "exp_avg_sq"):
            if (safe_get_full_optimizer_state(param, slot) - state[slot]).abs().max() > bound:
                wrong.append(f"{slot} of {name}")
    for name, param in named.items():
        values = oracle.masters[name].detach() * 0.5 + 0.01
        safe_set_full_fp32_param(param, values)
        oracle.masters[name].data.copy_(values)
        oracle.named[name].data.copy_(values)
        safe_set_full_optimizer_state(param, torch.full_like(values, 0.02), "exp_avg")
        owner[name].state[oracle.masters[name]]["exp_avg"].fill_(0.02)
    # DeepSpeed writes the master; the model's weight follows at the next update of its parameter.
    run(train_step, engine, 6, 4)
    run(train_step, oracle, 6, 4)
    return {"wrong": wrong, "distance": distance(weights_of(engine), weights_of(oracle), start)}


def saved_and_loaded(stage: int, dtype: str, folder: str, at: int) -> dict[str, Any]:
    """Save in the middle of a cycle, train on, load into a fresh engine: both end alike. Evaluation between."""
    first = hift_engine(Stack(0), stage, dtype, gas=2)
    run(train_step, first, at)
    first.save_checkpoint(folder)
    _evaluate(first)
    run(train_step, first, 4, at)
    fresh = hift_engine(Stack(1), stage, dtype, gas=2)
    fresh.load_checkpoint(folder)
    run(train_step, fresh, 2, at)
    _evaluate(fresh)
    run(train_step, fresh, 2, at + 2)
    return {"difference": largest_difference(weights_of(first), weights_of(fresh))}


def _evaluate(engine: Any) -> None:
    engine.eval()
    with torch.no_grad():
        loss_of(engine(data(99)))
    engine.train()


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


def _loss_in(output: Any) -> torch.Tensor:
    if isinstance(output, dict):
        return output["loss"]
    return output[0]


def outputs(stage: int, kind: str, torch_style: bool) -> dict[str, Any]:
    """Three contestants whose forward returns a container."""
    found = {}
    for way in ("rotating", "plain"):
        engine = hift_engine(Outputs(kind), stage) if way == "rotating" else plain_engine(Outputs(kind), stage)
        every = [[name for name, _ in engine.module.named_parameters()]]
        oracle = TorchHiFT(Outputs(kind), blocks_of(engine) if way == "rotating" else every)
        start = weights_of(oracle)
        for step in range(5):
            for contestant in (engine, oracle):
                loss = _loss_in(contestant(data(step)))
                if torch_style and contestant is engine and not (way == "plain" and stage == 0):
                    loss.backward()
                else:
                    contestant.backward(loss)
                contestant.step()
        found[way] = distance(weights_of(engine), weights_of(oracle), start)
    return found


def scaled_loss(stage: int) -> dict[str, float]:
    """`engine.backward(loss, scale_wrt_gas=False)`, as callers do who divide by themselves."""
    engine = hift_engine(Stack(), stage, gas=2)
    oracle = TorchHiFT(Stack(), blocks_of(engine), gas=2)
    start = weights_of(oracle)
    for step in range(4):
        for micro in range(2):
            engine.backward(loss_of(engine(data(step, micro))) / 2, scale_wrt_gas=False)
            engine.step()
        train_step(oracle, step)
    return {"distance": distance(weights_of(engine), weights_of(oracle), start)}


def plain_optimizer_state(stage: int) -> dict[str, Any]:
    """What users read of an engine and its optimizer, plain's beside ours: types before and after steps."""
    found = {}
    for name in ("plain", "hift"):
        module = Stack()
        engine = plain_engine(module, stage) if name == "plain" else hift_engine(module, stage)
        facts = {"norm before": type(engine.get_global_grad_norm()).__name__}
        run(train_step, engine, 2)
        facts.update({
            "norm": type(engine.get_global_grad_norm()).__name__,
            "lr": engine.get_lr(),
            "groups": [sorted({*HYPER, "params"} & set(group)) for group in engine.optimizer.param_groups],
            "state": isinstance(engine.optimizer.state, dict),
            "steps": engine.global_steps, "micro": engine.micro_steps, "samples": engine.global_samples,
            "applied": engine.was_step_applied(),
        })  # fmt: skip
        found[name] = facts
    return found
