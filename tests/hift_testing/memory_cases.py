"""Cases that run on ranks: device bytes at init and during steps, with host and device as separate memories."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from deepspeed import comm as dist
from hift_testing.device_meter import DeviceMeter
from hift_testing.invariant_cases import digest_of, state_by_block, weights_by_block
from hift_testing.training import DTYPES, cast_parameters, ds_config, engine_of, run_steps
from torch import nn

from hift_ds import optimizer
from hift_ds.engine import HiFTEngine

WIDTH, LAYERS, TILE = 64, 12, 2048
BUCKET = 20_000  # elements: the largest parameter has 16,384, so each weight matrix is a bucket of its own


class Stack(nn.Module):
    """Twelve equal layers, each a block; few activations, so that weights, gradients and state stand out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Tanh(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(LAYERS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


@contextmanager
def separate_host(separate: bool = True, tile: int = TILE) -> Iterator[None]:
    """Host and device as separate memories although both are the CPU, and updates in small tiles."""
    with mock.patch.object(HiFTEngine, "separate_host", separate), mock.patch.object(optimizer, "TILE_NUMEL", tile):
        yield


def _config(stage: int, dtype: str, hift: dict[str, Any], **extra: Any) -> dict[str, Any]:
    buckets = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    return ds_config(stage, dtype, hift, zero_optimization=buckets, **extra)


def measured(
    stage: int, dtype: str, hift: dict[str, Any] | None = None, start: str | None = None, accumulation: int = 1
) -> dict[str, Any]:
    """Device bytes of init and of one cycle's steps on this rank.

    Args:
        start: dtype of the model before `initialize`; the engine's by default.

    Returns:
        Bytes: `given`, the weights before init; `weights`, those after; `init`, the peak of init; `idle`, what is alive
        after init; `host`; by step `forward` (alive after it), `backward` and `step` (their peaks), `after`. Elements:
        `block` and `shard` of the largest block, `parameter`, the largest; `always`, bytes of its state.
    """
    model = cast_parameters(Stack(), DTYPES[start or dtype])
    meter = DeviceMeter(model.parameters())
    facts: dict[str, Any] = {"given": meter.current, "forward": [], "backward": [], "step": [], "after": []}
    gc.collect()
    with separate_host(), meter.measuring():
        engine = engine_of(_config(stage, dtype, hift or {}, gradient_accumulation_steps=accumulation), model)
        facts["init"] = meter.peak
        gc.collect()
        meter.reset_peak()
        facts["idle"] = meter.current
        facts["host"] = meter.host
        for step in range(LAYERS):
            x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float32)
            x = x.to(DTYPES[dtype])
            for micro in range(accumulation):
                loss = engine(x)
                meter.reset_peak()
                forward = meter.current
                engine.backward(loss)
                backward = meter.peak
                del loss
                gc.collect()  # ZeRO-3's hooks leave cycles
                meter.reset_peak()
                engine.step()
                if micro + 1 == accumulation:
                    facts["forward"].append(forward)
                    facts["backward"].append(backward)
                    facts["step"].append(meter.peak)
            gc.collect()
            meter.reset_peak()
            facts["after"].append(meter.current)
    states = engine.optimizer.states
    facts["weights"] = sum(
        (param.ds_tensor if hasattr(param, "ds_id") else param).numel() * param.element_size()
        for param in engine.module.parameters()
    )
    facts["block"] = max(state.shard.numel * state.shard.world for state in states)
    facts["shard"] = max(state.shard.numel for state in states)
    facts["parameter"] = 4 * WIDTH * WIDTH
    always = engine.optimizer.always
    facts["always"] = 0 if always is None else sum(tensor.nbytes for tensor in always.tensors())
    facts["world"] = dist.get_world_size()
    return facts


def same_training(stage: int, dtype: str, hift: dict[str, Any], rule: dict[str, Any] | None = None) -> list[str]:
    """Fingerprints of weights and state after 14 steps: one memory and one tile, then two memories and many tiles."""
    found = []
    for separate, tile in ((False, 1 << 23), (True, 48)):
        with separate_host(separate, tile):
            config = ds_config(stage, dtype, {**hift}, **({"optimizer": rule} if rule else {}))
            engine = engine_of(config)
            assert engine.optimizer.states[0].copies == separate
            run_steps(engine, 14)
        found.append(digest_of(weights_by_block(engine)) + digest_of(state_by_block(engine)))
    return found
