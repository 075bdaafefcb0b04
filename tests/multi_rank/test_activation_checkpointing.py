"""Activation checkpointing: the same training, a backward that stops at the active block, no silent zero updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from hift_testing.disturbed import Reentrant
from hift_testing.fingerprints import all_by_block, changed
from hift_testing.messages import error_of, logged
from hift_testing.selection import diagonal, slow
from hift_testing.training import ds_config, engine_of, run_steps, small_llama

pytestmark = pytest.mark.multi_rank


def top_down(stage: int, reentrant: bool | None) -> dict[str, str]:
    """Trains top-down; `reentrant` = None is the run without checkpointing. Returns fingerprints of all."""
    model = small_llama()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    with logged("hift_ds.zero.activations") as warnings:
        engine = engine_of(ds_config(stage, "fp32", {"order": "top2down"}), model)
    layers = engine.module.model.layers
    alive, runs = [False] * len(layers), [0] * len(layers)

    def count(index: int) -> None:
        runs[index] += 1

    for index, layer in enumerate(layers):
        # Inside the layer, for transformers checkpoints its forward without its hooks; and before the mlp runs, for a
        # recomputation ends as soon as all that backward needs is there.
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: count(index))
        layer.register_forward_hook(lambda _, __, out, index=index: alive.__setitem__(index, out.requires_grad))
    for step, active in enumerate([5, 4, 3, 2, 1, 0, 5]):
        runs[:] = [0] * len(layers)
        assert engine.hift.active_block == active
        run_steps(engine, 1, start=step)
        # Block 0 is the embedding, blocks 1-4 are the layers: what lies below has no gradient and is not run again.
        reached = [layer + 1 >= active for layer in range(4)]
        assert alive == reached
        assert [count - 1 for count in runs] == [int(layer and reentrant is not None) for layer in reached]
    assert len(warnings) == (reentrant is True and dist.get_rank() == 0)
    assert all("use_reentrant=False" in warning for warning in warnings)
    return all_by_block(engine)


@pytest.mark.parametrize("stage", [0, slow(2), 3])
def test_checkpointing_trains_the_same_and_stops_at_the_active_block(two_ranks, stage):
    plain = two_ranks.run(top_down, stage, None)
    for reentrant in (True, False):
        assert two_ranks.run(top_down, stage, reentrant) == plain


def test_without_checkpointing_nothing_is_recomputed_or_warned_of(two_ranks):
    two_ranks.run(top_down, 1, None)


def own_reentrant_checkpoint(stage: int, always: bool) -> None:
    """A block inside of it gets no gradient; with `always` a head outside does."""
    hift: dict[str, Any] = {"layers_per_block": 1, **({"always_active": ["^head"]} if always else {})}
    engine = engine_of(ds_config(stage, "fp32", hift), Reentrant(always))
    before = all_by_block(engine)

    def train() -> None:
        engine.backward(engine(torch.ones(2, 6)))
        engine.step()

    error = error_of(train)
    assert error.startswith("RuntimeError: block 0 (layers.0) received no gradient on any rank")
    assert "use_reentrant=False" in error
    assert changed(before, all_by_block(engine)) == []


@pytest.mark.parametrize(("stage", "always"), diagonal(range(4), (False, True)))
def test_a_models_own_reentrant_checkpoint_raises_on_every_rank(two_ranks, stage, always):
    two_ranks.run(own_reentrant_checkpoint, stage, always)
