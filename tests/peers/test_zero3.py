"""What users do with a ZeRO-3 engine between steps: hooks off and on, generation, whole weights, caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero import unwrap_model_for_generation
from hift_testing.contestants import (
    ONE_BLOCK,
    Stack,
    TorchHiFT,
    assert_near,
    blocks_of,
    data,
    hift_engine,
    loss_of,
    on,
    pair,
    plain_engine,
    run,
    train_step,
    unmoved,
)
from hift_testing.selection import slow
from hift_testing.tiny_models import tiny_model
from hift_testing.training import batch_of, largest_difference, whole_weights

pytestmark = pytest.mark.multi_rank

FORWARD = {"fp32": 1e-5, "bf16": 0.05}  # a few roundings of values of size 1, after weights within BOUNDS


def difference(output: torch.Tensor, right: torch.Tensor) -> float:
    return (output.float() - right.float()).abs().max().item()


def remove_hooks(engine: Any) -> None:
    """As TRL does it before generation."""
    offload = engine.optimizer.parameter_offload
    for param in engine.module.parameters():
        param.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def add_hooks(engine: Any) -> None:
    offload = engine.optimizer.parameter_offload
    offload._register_deepspeed_module(offload.module)


@contextmanager
def by_trl(engine: Any) -> Iterator[Any]:
    with deepspeed.zero.GatheredParameters(engine.module.parameters()):
        remove_hooks(engine)
        yield engine.module
        add_hooks(engine)


def unwrapped(dtype: str, how: str, where: str, plain: bool = False) -> None:
    """Hooks come off for forwards without them, and on again; training goes on as without.

    Args:
        how: `deepspeed` (its context manager) or `trl`.
        where: `first` before any step, `every` step, `within` a window of two micro steps.
    """
    gas = 2 if where == "within" else 1
    engine = plain_engine(Stack(), 3, dtype, gas) if plain else hift_engine(Stack(), 3, dtype, gas=gas)
    every = [[name for name, _ in engine.module.named_parameters()]]
    oracle = TorchHiFT(Stack(), every if plain else blocks_of(engine), dtype, gas)
    make = {"deepspeed": unwrap_model_for_generation, "trl": by_trl}[how]

    def visit(step: int) -> None:
        with make(engine) as unwrapped, torch.no_grad():
            inner = unwrapped.module if hasattr(unwrapped, "module") else unwrapped
            assert plain or difference(inner(data(step)), oracle(data(step))) <= FORWARD[dtype]

    for step in range(3 * len(oracle.blocks)):
        if where == "every" or (where == "first" and step == 0):
            visit(step)
        for micro in range(gas):
            if where == "within" and micro == 1:
                visit(step)
            for contestant in (engine, oracle):
                contestant.backward(loss_of(contestant(data(step, micro))))
                contestant.step()
    assert_near(engine, oracle, dtype)


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("where", ("first", "every", "within"))
@pytest.mark.parametrize("how", ("deepspeed", "trl"))
def test_hooks_come_off_and_on_and_training_goes_on(ranks, how, where, dtype):
    on(ranks, unwrapped, dtype, how, where)


@pytest.mark.slow
@pytest.mark.parametrize("where", ("first", "every", "within"))
@pytest.mark.parametrize("how", ("deepspeed", "trl"))
def test_hooks_of_plain_deepspeed_come_off_and_on(ranks, how, where):
    on(ranks, unwrapped, "fp32", how, where, plain=True)


def consolidated(dtype: str) -> None:
    """Whole 16-bit weights with and without frozen ones, whichever block is active; on rank 0 alone."""
    module = Stack()
    module.head.bias.requires_grad_(False)
    engine = hift_engine(module, 3, dtype, {"frozen": [r"layers\.1\.linear\.bias"]})
    names = {name for name, _ in module.named_parameters()}
    for step in range(4):
        run(train_step, 1, engine, start=step)
        whole = whole_weights(engine)
        for frozen in ({"head.bias", "layers.1.linear.bias"}, set()):
            state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=bool(frozen))
            if dist.get_rank() == 0:
                assert state.keys() == names - frozen
                assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())
            else:
                assert state is None
    run(train_step, 1, engine, start=50)
    assert len(unmoved(whole_weights(engine), whole)) < len(whole), "the engine still trains"


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_consolidated_weights_hold_every_trained_parameter_whichever_block_is_active(ranks, dtype):
    on(ranks, consolidated, dtype)


def inference_of_a_stack(stage: int, dtype: str) -> None:
    """Forwards under inference mode, also the first one of all, and two in a row."""
    engine, oracle = pair(Stack, stage, dtype)
    for step in range(2 * len(oracle.blocks) + 1):
        for _ in range(2):
            with torch.inference_mode():
                output = engine(data(step))
            with torch.no_grad():
                assert difference(output, oracle(data(step))) <= FORWARD[dtype]
        train_step(engine, step)
        train_step(oracle, step)
    assert_near(engine, oracle, dtype)


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_forward_under_inference_mode_changes_nothing(ranks, stage, dtype):
    on(ranks, inference_of_a_stack, stage, dtype)


def generate(engine: Any, ids: torch.Tensor) -> None:
    engine.eval()
    with torch.inference_mode():
        engine(input_ids=ids)
        engine.module.generate(ids[:, :4], max_new_tokens=3, do_sample=False, synced_gpus=True, use_cache=False)
    engine.train()


def inference_between_steps(stage: int, dtype: str, family: str, hift: dict[str, Any]) -> None:
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
                    generate(engine, batch["input_ids"])
                engine.step()
            if visit:
                generate(engine, batch["input_ids"])
        weights.append(whole_weights(engine))
    assert largest_difference(*weights) == 0.0


@pytest.mark.parametrize(("family", "hift"), (slow("llama", {}), ("qwen2", {}), slow("llama", ONE_BLOCK)))
@pytest.mark.parametrize("stage", (slow(2), 3))
def test_generation_under_inference_mode_changes_nothing(two_ranks, stage, family, hift):
    on(two_ranks, inference_between_steps, stage, "bf16", family, hift)


def emptied(dtype: str) -> None:
    """`engine.empty_partition_cache()` releases what is gathered, and training goes on."""
    none_persist = {"stage3_param_persistence_threshold": 0}
    engine, oracle = pair(lambda: Stack(width=32), 3, dtype, zero_optimization=none_persist)
    for step in range(2 * len(oracle.blocks) + 1):
        for contestant in (engine, oracle):
            contestant.backward(loss_of(contestant(data(step, width=32))))
            contestant.step()
        with torch.no_grad():
            engine(data(step, width=32))
        engine.empty_partition_cache()
        assert sum(param.numel() for param in engine.module.parameters()) == 0
    assert_near(engine, oracle, dtype)


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_an_emptied_partition_cache_holds_nothing_and_training_goes_on(ranks, dtype):
    on(ranks, emptied, dtype)


class Shared(Stack):
    """One layer called twice; hooks and traces meet a module two times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.head.weight.dtype)
        for layer in (*self.layers, self.layers[0]):
            x = layer(x)
        return self.head(x)


def called_twice(stage: int, dtype: str) -> None:
    engine, oracle = pair(Shared, stage, dtype)
    run(train_step, 7, engine, oracle)
    assert_near(engine, oracle, dtype)


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_layer_that_is_called_twice_trains(ranks, stage):
    on(ranks, called_twice, stage, "fp32")
