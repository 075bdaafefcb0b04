"""Cases that run on ranks: HiFT on ZeRO against `ReferenceHiFT`."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm as dist

from hift_testing.reference import ReferenceHiFT
from hift_testing.training import (
    ADAMW,
    DTYPES,
    batch_of,
    cast_parameters,
    ds_config,
    engine_of,
    largest_difference,
    run_steps,
    small_llama,
    whole_weights,
)


def adamw(members: list[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([tensor for _, tensor in members], foreach=False, **ADAMW["params"])


def parity(stage: int, dtype: str, hift: dict[str, Any], accumulation: int = 1, clip: float = 0.0, rotations: int = 2,
           always: bool = False) -> dict[str, float]:  # fmt: skip
    """Trains both for `rotations` rotations; returns the largest differences of weights, losses and norms."""
    config = ds_config(
        stage, dtype, hift, gradient_accumulation_steps=accumulation, gradient_clipping=clip,
    )  # fmt: skip
    engine = engine_of(config)
    view = engine.hift
    steps = rotations * len(view.blocks) * hift.get("steps_per_block", 1)
    model = cast_parameters(small_llama(), DTYPES[dtype])
    reference = ReferenceHiFT(
        model, [block.fqns for block in view.blocks], view.order, adamw, lambda step: ADAMW["params"]["lr"], clip,
        steps_per_block=hift.get("steps_per_block", 1), always=engine.block_plan.always_active,
        accumulate_before_reducing=stage < 2,
    )  # fmt: skip
    norms = []
    run_steps(engine, steps, after_step=lambda step: norms.append(engine.get_global_grad_norm()))
    world = dist.get_world_size()
    for step in range(steps):
        reference.step([[batch_of(step, micro, rank) for micro in range(accumulation)] for rank in range(world)])
    weights = whole_weights(engine)
    moved = largest_difference(weights, {n: p.detach() for n, p in cast_parameters(small_llama(), DTYPES[dtype]).named_parameters()})
    return {
        "weights": largest_difference(weights, {n: p.detach() for n, p in model.named_parameters()}),
        "norm": max(abs(a - b) / b for a, b in zip(norms, reference.norms)),
        "moved": moved,
        "blocks": len(view.blocks),
    }
