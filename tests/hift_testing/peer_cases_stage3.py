"""Cases of the peers at ZeRO-3: hooks taken off and put on, gathered weights, generation, consolidated weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero import unwrap_model_for_generation
from hift_testing.peer_cases import (
    Layer,
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
from hift_testing.tiny_models import tiny_model
from hift_testing.training import batch_of, largest_difference
from torch import nn


def _remove_hooks(engine: Any) -> None:
    """As TRL does it before generation."""
    offload = engine.optimizer.parameter_offload
    for param in engine.module.parameters():
        param.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def _add_hooks(engine: Any) -> None:
    offload = engine.optimizer.parameter_offload
    offload._register_deepspeed_module(offload.module)


@contextmanager
def _by_trl(engine: Any) -> Iterator[Any]:
    with deepspeed.zero.GatheredParameters(engine.module.parameters()):
        _remove_hooks(engine)
        yield engine.module
        _add_hooks(engine)


def unwrapped(stage: int, dtype: str, how: str, where: str, plain: bool = False) -> dict[str, Any]:
    """Hooks come off for forwards without them, and on again; training goes on as without.

    Args:
        how: `deepspeed` (its context manager) or `trl`.
        where: `first` before any step, `every` step, `within` a window of two micro steps.
    """
    gas = 2 if where == "within" else 1
    engine = plain_engine(Stack(), 3, dtype, gas) if plain else hift_engine(Stack(), 3, dtype, gas=gas)
    every = [[name for name, _ in engine.module.named_parameters()]]
    oracle = TorchHiFT(Stack(), every if plain else blocks_of(engine), dtype, gas)
    start, far = weights_of(oracle), []
    make = {"deepspeed": unwrap_model_for_generation, "trl": _by_trl}[how]

    def visit(step: int) -> None:
        with make(engine) as unwrapped, torch.no_grad():
            inner = unwrapped.module if hasattr(unwrapped, "module") else unwrapped
            far.append((inner(data(step)).float() - oracle(data(step)).float()).abs().max().item())

    for step in range(3 * len(oracle.blocks)):
        if where == "every" or (where == "first" and step == 0):
            visit(step)
        for micro in range(gas):
            if where == "within" and micro == 1:
                visit(step)
            for contestant in (engine, oracle):
                contestant.backward(loss_of(contestant(data(step, micro))))
                contestant.step()
    return {"distance": distance(weights_of(engine), weights_of(oracle), start), "forward": max(far)}


def consolidated(dtype: str, steps: int) -> dict[str, Any]:
    """Whole 16-bit weights with and without frozen ones, whichever block is active."""
    module = Stack()
    module.head.bias.requires_grad_(False)
    engine = hift_engine(module, 3, dtype, {"frozen": [r"layers\.1\.linear\.bias"]})
    found: dict[str, Any] = {"without": [], "with": [], "wrong": []}
    for step in range(steps):
        run(train_step, engine, 1, step)
        whole = weights_of(engine)
        for key, exclude in (("without", True), ("with", False)):
            state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=exclude)
            if dist.get_rank() == 0:
                found[key].append(sorted(state))
                found["wrong"] += [name for name, tensor in state.items() if not torch.equal(tensor, whole[name])]
            else:
                assert state is None
    found["names"] = sorted(name for name, _ in module.named_parameters())
    found["after"] = error_free_step(engine)
    return found


def error_free_step(engine: Any) -> bool:
    """The engine still trains."""
    before = weights_of(engine)
    run(train_step, engine, 1, 50)
    after = weights_of(engine)
    return any(not torch.equal(after[name], before[name]) for name in after)


def inference_between_steps(stage: int, dtype: str, family: str, hift: dict[str, Any]) -> dict[str, Any]:
    """`generate` (or a forward) under torch.inference_mode() between steps and within windows changes nothing."""
    weights = []
    for visit in (True, False):
        torch.manual_seed(0)
        engine = hift_engine(tiny_model(family), stage, dtype, hift, 2)
        for step in range(len(engine.hift.blocks) + 2):
            for micro in range(2):
                batch = batch_of(step, micro, dist.get_rank())
                engine.backward(engine(**batch).loss)
                if visit:
                    _generate(engine, batch["input_ids"])
                engine.step()
            if visit:
                _generate(engine, batch["input_ids"])
        weights.append(weights_of(engine))
    return {"difference": largest_difference(*weights)}


def _generate(engine: Any, ids: torch.Tensor) -> None:
    engine.eval()
    with torch.inference_mode():
        engine(input_ids=ids)
        engine.module.generate(ids[:, :4], max_new_tokens=3, do_sample=False, synced_gpus=True, use_cache=False)
    engine.train()


def inference_of_a_stack(stage: int, dtype: str) -> dict[str, Any]:
    """Forwards under inference mode, also the first one of all, and two in a row."""
    engine = hift_engine(Stack(), stage, dtype)
    oracle = TorchHiFT(Stack(), blocks_of(engine), dtype)
    start, far = weights_of(oracle), 0.0
    for step in range(2 * len(oracle.blocks) + 1):
        for _ in range(2):
            with torch.inference_mode():
                output = engine(data(step))
            with torch.no_grad():
                far = max(far, (output.float() - oracle(data(step)).float()).abs().max().item())
        train_step(engine, step)
        train_step(oracle, step)
    return {"distance": distance(weights_of(engine), weights_of(oracle), start), "forward": far}


def emptied(dtype: str) -> dict[str, Any]:
    """`engine.empty_partition_cache()` releases what is gathered, and training goes on."""
    engine = hift_engine(Stack(width=32), 3, dtype, zero_optimization={"stage3_param_persistence_threshold": 0})
    oracle = TorchHiFT(Stack(width=32), blocks_of(engine), dtype)
    start, left = weights_of(oracle), []
    for step in range(2 * len(oracle.blocks) + 1):
        for contestant in (engine, oracle):
            contestant.backward(loss_of(contestant(data(step, width=32))))
            contestant.step()
        with torch.no_grad():
            engine(data(step, width=32))
        engine.empty_partition_cache()
        left.append(sum(param.numel() for param in engine.module.parameters()))
    return {"distance": distance(weights_of(engine), weights_of(oracle), start), "gathered": max(left)}


class Shared(nn.Module):
    """One layer called twice; hooks and traces meet a module two times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(6) for _ in range(2))
        self.head = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.head.weight.dtype)
        for layer in (*self.layers, self.layers[0]):
            x = layer(x)
        return self.head(x)


def called_twice(stage: int, dtype: str) -> dict[str, Any]:
    engine = hift_engine(Shared(), stage, dtype)
    oracle = TorchHiFT(Shared(), blocks_of(engine), dtype)
    start = weights_of(oracle)
    run(train_step, engine, 7)
    run(train_step, oracle, 7)
    return {"distance": distance(weights_of(engine), weights_of(oracle), start)}
