"""Training with layers compiled beside training without."""

from __future__ import annotations

from typing import Any

import pytest
import torch._dynamo
from hift_testing.training import ds_config, engine_of, largest_difference, run_steps, small_llama, whole_weights
from torch._dynamo.utils import counters

import hift_ds


def both_ways(stage: int, hift: dict[str, Any], checkpointing: bool, backend: str = "aot_eager", **extra: Any) -> None:
    """A cycle of turns with layers compiled and without: the same losses and weights.

    SGD, whose steps are as far apart as gradients are.
    """
    found = []
    for compiled in (True, False):
        model = small_llama()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch._dynamo.reset()
        counters.clear()
        if compiled:
            hift_ds.compile_layers(model, backend=backend)
        config = ds_config(stage, "fp32", hift, **extra)
        config["optimizer"] = {"type": "SGD", "params": {"lr": 0.5}}
        engine = engine_of(config, model)
        losses = run_steps(engine, 7)
        found.append((losses, whole_weights(engine)))
        assert (counters["stats"]["unique_graphs"] > 0) == compiled and not counters["graph_break"]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    moved = largest_difference(found[0][1], dict(small_llama().named_parameters()))
    assert largest_difference(found[0][1], found[1][1]) <= 1e-4 * moved and moved > 1e-2
