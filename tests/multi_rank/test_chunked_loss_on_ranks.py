"""The loss in chunks through the engine: training as with the whole matrix of logits."""

from __future__ import annotations

from typing import Any

import pytest
from hift_testing.selection import slow
from hift_testing.training import ds_config, engine_of, largest_difference, run_steps, small_llama, whole_weights

from hift_ds.chunked_loss import use_chunked_loss

pytestmark = pytest.mark.multi_rank

TILE = 4 * 96 * 5  # five tokens


def both_losses(stage: int, hift: dict[str, Any], tied: bool, **extra: Any) -> None:
    """Five steps with each; SGD, whose steps are as far apart as gradients are."""
    found = []
    for chunked in (True, False):
        model = small_llama(tied=tied)
        if chunked:
            use_chunked_loss(model, TILE)
        config = ds_config(stage, "fp32", hift, **extra)
        config["optimizer"] = {"type": "SGD", "params": {"lr": 0.5}}
        engine = engine_of(config, model)
        losses = run_steps(engine, 5)
        found.append((losses, whole_weights(engine)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    moved = largest_difference(found[0][1], dict(small_llama(tied=tied).named_parameters()))
    assert largest_difference(found[0][1], found[1][1]) <= 1e-4 * moved and moved > 1e-2


CASES = [
    (0, {}, False), slow(1, {}, True), (2, {"update": "backward", "layers_per_block": 100}, True),
    (3, {"order": "top2down"}, False), slow(3, {"update": "backward", "layers_per_block": 2}, True),
    slow(0, {"frozen": ["lm_head"]}, False), (2, {"frozen": ["lm_head"], "update": "backward"}, False),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "hift", "tied"), CASES)
def test_training_with_the_loss_in_chunks_is_training_with_it_whole(two_ranks, stage, hift, tied):
    two_ranks.run(both_losses, stage, hift, tied)


def test_micro_steps_scale_its_gradients(two_ranks):
    hift = {"update": "backward", "layers_per_block": 100}
    two_ranks.run(both_losses, 1, hift, False, gradient_accumulation_steps=2)
