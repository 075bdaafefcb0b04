"""Compiled layers through the engine: training as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch._dynamo
from hift_testing.compiled_layers import both_ways
from hift_testing.messages import error_of
from hift_testing.selection import slow
from hift_testing.training import ds_config, engine_of, largest_difference, run_steps, small_llama, whole_weights

import hift_ds
from hift_ds.compiled_layers import _UNSAFE_GUARDS

UNSAFE = [name for name in _UNSAFE_GUARDS if hasattr(torch._dynamo.config, name)]
pytestmark = pytest.mark.multi_rank


CASES = [
    (0, {}, False), (2, {"update": "backward", "layers_per_block": 100}, True),
    slow(1, {"order": "top2down"}, True), slow(2, {"update": "backward", "layers_per_block": 2}, False),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "hift", "checkpointing"), CASES)
def test_training_with_compiled_layers_is_training_without(two_ranks, stage, hift, checkpointing):
    two_ranks.run(both_ways, stage, hift, checkpointing)


@pytest.mark.slow
def test_training_with_torch_s_own_compiler_is_training_without(two_ranks):
    hift = {"update": "backward", "layers_per_block": 2}
    two_ranks.run(both_ways, 1, hift, True, "inductor", gradient_accumulation_steps=2)


def whole(when: str) -> None:
    """torch.compile by the user's own hand: before initialize, by the engine, or behind its back."""
    found = []
    for compiled in (True, False):
        torch._dynamo.reset()
        for name in UNSAFE:
            setattr(torch._dynamo.config, name, True)
        model: Any = small_llama()
        if compiled and when == "before":
            model = torch.compile(model, backend="aot_eager")
        config = ds_config(1, "fp32", {"layers_per_block": 2})
        config["optimizer"] = {"type": "SGD", "params": {"lr": 0.5}}
        engine = engine_of(config, model)
        if compiled and when == "by the engine":
            engine.compile(backend="aot_eager")
        if compiled and when == "a layer, later":
            for layer in engine.module.model.layers:
                layer.compile(backend="aot_eager")
        run_steps(engine, 7)
        found.append({name.removeprefix("_orig_mod."): weight for name, weight in whole_weights(engine).items()})
        engine.destroy()
    moved = largest_difference(found[0], dict(small_llama().named_parameters()))
    assert largest_difference(*found) <= 1e-4 * moved and moved > 1e-2


@pytest.mark.parametrize("when", ["before", "by the engine", "a layer, later"])
def test_torch_compile_sees_each_turn_s_parameters(one_rank, when):
    """By torch 2.11's own guards it does not, and a block's gradients are lost."""
    one_rank.run(whole, when)


def refused_and_left_as_it_was() -> None:
    model = small_llama()
    hift_ds.compile_layers(model, backend="aot_eager")
    error = error_of(lambda: engine_of(ds_config(3, "fp32", {}), model))
    assert error.startswith("ValueError: compile_layers (--compile): ZeRO-3 gathers weights in hooks"), error
    assert all(not hasattr(param, "ds_id") for param in model.parameters())
    engine_of(ds_config(2, "fp32", {}), model).destroy()


def test_stage_3_is_refused_and_the_same_model_trains_with_stage_2(one_rank):
    one_rank.run(refused_and_left_as_it_was)
