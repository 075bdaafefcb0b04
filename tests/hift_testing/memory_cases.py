"""Cases that run on ranks: device bytes at init and during steps, with host and device as separate memories."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from unittest import mock

import torch
from hift_testing.delayed_lanes import lazy_copies
from hift_testing.device_meter import DeviceMeter
from hift_testing.invariant_cases import digest, digest_of, state_by_block, weights_by_block
from hift_testing.training import DTYPES, cast_parameters, ds_config, engine_of, run_steps, small_llama, whole_weights
from torch import nn

from hift_ds import engine as engine_module
from hift_ds.engine import HiFTEngine
from hift_ds.memory.plan import Planner
from hift_ds.memory.request import Request
from hift_ds.rules.adam import Adam
from hift_ds.state import block_state as state
from hift_ds.state import ring
from hift_ds.state.ring import Lanes
from hift_ds.zero import host_update

WIDTH, LAYERS, TILE, STEPS = 64, 12, 2048, 3
RING_BYTES = 3 * TILE * 12  # three tiles of fp32 master and moments
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
def separate_host(separate: bool = True, tile: int = state.TILE_MULTIPLE) -> Iterator[None]:
    """Host and device as separate memories although both are the CPU; `tile`: elements of the ring's smallest."""
    with mock.patch.object(HiFTEngine, "separate_host", separate), mock.patch.object(state, "TILE_MULTIPLE", tile):
        yield


def _config(stage: int, dtype: str, hift: dict[str, Any], **extra: Any) -> dict[str, Any]:
    buckets = {
        "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": 2 * BUCKET,
    }  # fmt: skip
    return ds_config(stage, dtype, {"state": {"ring_bytes": RING_BYTES}, **hift}, zero_optimization=buckets, **extra)


def measured(
    stage: int,
    dtype: str,
    hift: dict[str, Any] | None = None,
    start: str | None = None,
    accumulation: int = 1,
    rule: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Device bytes of init and of a few steps on this rank.

    Args:
        rule: The config's "optimizer" section.
        start: dtype of the model before `initialize`; the engine's by default.

    Returns:
        Bytes: `given`, the weights before init; `weights`, those after; `init`, the peak of init; `idle`, what is alive
        after init; `ring`; `host`; `backward`, `step`, `after`: the peaks of the phases and what is alive after a step,
        over the weights and what forward has left, at the worst step; `always`, state of the always-active. Elements:
        `block` and `shard`, of everything that trains at the worst step, `bucket`, the largest.
    """
    model = cast_parameters(Stack(), DTYPES[start or dtype])
    meter = DeviceMeter(model.parameters())
    facts: dict[str, Any] = {"given": meter.current}
    phases: dict[str, list[int]] = {"backward": [], "step": [], "after": []}
    with separate_host(), meter.measuring():
        extra = {"gradient_accumulation_steps": accumulation, **({"optimizer": rule} if rule else {})}
        engine = engine_of(_config(stage, dtype, hift or {}, **extra), model)
        facts["init"] = meter.peak
        gc.collect()  # what DeepSpeed's set-up leaves in cycles
        meter.restart()
        facts["idle"] = meter.current
        facts["host"] = meter.host
        for step in range(STEPS):
            x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float32)
            x = x.to(DTYPES[dtype])
            for _ in range(accumulation):
                loss = engine(x)
                meter.restart()
                forward = meter.current
                engine.backward(loss)
                phases["backward"].append(meter.peak - forward)
                del loss
                meter.restart()
                engine.step()
                phases["step"].append(meter.peak)
            if engine.optimizer.config.kernel == "triton":
                gc.collect()  # Triton's interpreter holds the storages of its arguments in cycles
            time.sleep(0.02)  # gloo's threads hold a collective's tensors a moment longer (measured: under 10 ms)
            meter.restart()
            phases["after"].append(meter.current)
    weights = sum(
        (param.ds_tensor if hasattr(param, "ds_id") else param).numel() * param.element_size()
        for param in engine.module.parameters()
    )
    always = [] if engine.optimizer.always is None else [engine.optimizer.always]
    trained = [[state.shard, *(other.shard for other in always)] for state in engine.optimizer.states]
    return facts | {
        "weights": weights,
        "backward": max(phases["backward"]),
        "step": max(phases["step"]) - weights,
        "after": max(phases["after"]) - weights,
        "ring": engine.optimizer.ring.nbytes,
        "always": sum(tensor.nbytes for state in always for tensor in state.all_tensors()),
        "shard": max(sum(shard.numel for shard in shards) for shards in trained),
        "block": max(sum(shard.numel * shard.world for shard in shards) for shards in trained),
        "bucket": max(
            (span.stop - span.start) * shard.world
            for shards in trained for shard in shards for span in map(shard.span, shard.buckets(BUCKET))
        ),
        "parameter": 4 * WIDTH * WIDTH,
    }  # fmt: skip


def same_training(stage: int, dtype: str, hift: dict[str, Any], rule: dict[str, Any] | None = None) -> list[str]:
    """Fingerprints of weights and state after 9 steps: one memory and one tile; two memories and many tiles; the same
    with copies that happen at the last moment."""
    found, factored = [], 0
    for separate, lanes in ((False, Lanes.of), (True, Lanes.of), (True, lazy_copies)):
        with separate_host(separate, tile=48), mock.patch.object(Lanes, "of", lanes):
            ring = {"ring_bytes": 3 * 3 * 256 + factored} if separate else {}
            config = ds_config(stage, dtype, {**hift, "state": ring}, **({"optimizer": rule} if rule else {}))
            engine = engine_of(config)
            factored = state.extra_bytes(block.extra for block in engine.optimizer.states)
            assert engine.optimizer.states[0].streams == separate
            assert len(engine.optimizer.states[0].tiles) > 10 or not separate
            run_steps(engine, 9)
        found.append(digest_of(weights_by_block(engine)) + digest_of(state_by_block(engine)))
    return found


def same_resumption(folder: str, stage: int, dtype: str, hift: dict[str, Any]) -> list[list[str]]:
    """Fingerprints of weights and state in one memory, then in two with copies that happen at the last moment: a run
    that is saved goes on, goes back and goes on; another one loads it; a third, in its course, the weights alone."""
    found = []
    for separate, lanes in ((False, Lanes.of), (True, lazy_copies)):
        place = f"{folder}/{separate}"
        config = ds_config(stage, dtype, {**hift, "state": {"ring_bytes": 3 * 3 * 256} if separate else {}})
        with separate_host(separate, tile=48), mock.patch.object(Lanes, "of", lanes):
            first, second, third = (engine_of(config, small_llama(seed)) for seed in range(3))
            run_steps(first, 8)
            first.save_checkpoint(place)
            marks = [_mark(first, 8)]
            first.load_checkpoint(place)
            marks.append(_mark(first, 8))
            run_steps(second, 1)
            second.load_checkpoint(place)
            marks.append(_mark(second, 8))
            run_steps(third, 7)
            third.load_checkpoint(place, load_module_only=True)
            marks.append(_mark(third, 7))
        found.append(marks)
    return found


def _mark(engine: Any, start: int) -> str:
    run_steps(engine, 3, start=start)
    return digest_of(weights_by_block(engine)) + digest_of(state_by_block(engine))


def loaded_ahead(stage: int, hift: dict[str, Any]) -> dict[str, list[bool]]:
    """After each of seven steps, whether what the ring has loaded are the first tiles of the block whose turn comes,
    and how many; after a checkpoint's reading of the state, whether there is nothing."""
    with separate_host():
        engine = engine_of(ds_config(stage, "bf16", {**hift, "state": {"ring_bytes": 4 * 12 * state.TILE_MULTIPLE}}))
        optimizer, found = engine.optimizer, {"right": [], "full": []}
        for step in range(7):
            run_steps(engine, 1, start=step)
            tiles = optimizer.states[engine.hift.active_block].tiles
            ahead = [tile for tile, _ in optimizer.ring._ahead]
            found["right"].append(ahead == tiles[: len(ahead)])
            found["full"].append(len(ahead) == min(len(optimizer.ring._slots), len(tiles)))
        optimizer.state_dict()
        found["forgotten"] = [not optimizer.ring._ahead]
    return found


def reset_run(stage: int, dtype: str) -> dict[str, Any]:
    """Two cycles of turns of two steps, each begun with fresh state.

    Returns:
        `settled`: how often the ring made the host wait; `filled`: how often a tile was loaded without its moments, and
        `tiles`: of all turns, and those loaded ahead.
    """
    facts, load = {"settled": 0, "filled": 0, "tiles": 0}, ring._load

    def counting(sources: Any, targets: Any, initial: dict[str, float]) -> None:
        facts["filled"] += bool(initial)
        load(sources, targets, initial)

    with separate_host(), mock.patch.object(ring, "_load", counting):
        engine = engine_of(ds_config(stage, dtype, {"inactive_state": "reset", "steps_per_block": 2}))
        settle = engine.optimizer.ring.settle
        with mock.patch.object(engine.optimizer.ring, "settle", side_effect=settle) as settled:
            run_steps(engine, 4 * len(engine.hift.blocks))
        facts["settled"] = settled.call_count
        facts["tiles"] = 2 * sum(len(block.tiles) for block in engine.optimizer.states)
        facts["tiles"] += len(engine.optimizer.ring._ahead)
    return facts


def failed_reset(folder: str, stage: int, dtype: str) -> list[str]:
    """Fingerprints three steps after a checkpoint from the middle of a turn: gone on at once, and loaded after an
    update that failed at the start of the same block's next turn."""
    with separate_host():
        hift = {"inactive_state": "reset", "steps_per_block": 2, "layers_per_block": 3}
        engine = engine_of(ds_config(stage, dtype, hift))
        run_steps(engine, 1)
        engine.save_checkpoint(folder)
        found = [_mark(engine, 1)]
        cycle = 2 * len(engine.hift.blocks)
        run_steps(engine, cycle - 4, start=4)
        failing = mock.patch.object(engine.optimizer.ring, "visit", side_effect=MemoryError)
        with failing as failed, suppress(MemoryError):
            run_steps(engine, 1, start=cycle)
        assert failed.call_count == 1
        engine.load_checkpoint(folder)
        found.append(_mark(engine, 1))
    return found


def skipped_reset(stage: int, dtype: str) -> list[list[str]]:
    """Fingerprints of weights and state, in one memory and in two, right after a step that would have begun a turn with
    fresh state but had no gradient, and four steps later."""
    found, cycle, half = [], 4, LAYERS // 2
    for separate in (False, True):
        model = Stack()
        with separate_host(separate):
            keys = {"inactive_state": "reset", "steps_per_block": 2, "no_gradient": "skip", "layers_per_block": half}
            engine = engine_of(_config(stage, dtype, keys), model)
            layers, marks = list(model.layers), []
            for step in range(cycle + 5):
                for index in range(half if step == cycle else 0):
                    model.layers[index] = nn.Identity()
                x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(step)).to(DTYPES[dtype])
                engine.backward(engine(x.requires_grad_()))
                for index, layer in enumerate(layers):
                    model.layers[index] = layer
                engine.step()
                if step >= cycle:
                    marks.append(digest_of(weights_by_block(engine)) + digest_of(state_by_block(engine)))
        found.append(marks)
    return found


def same_ring(stage: int, dtype: str, card: int, **least: int) -> tuple[int, int, int]:
    """Bytes of the default ring on a card of so many bytes: the engine's, a plan's, and of the largest block's state.

    Args:
        least: `RING_BYTES`, in the place of 128 MiB.
    """
    model = small_llama()
    known = mock.patch.object(engine_module, "card_bytes", lambda device: card)
    with separate_host(tile=48), mock.patch.multiple(state, **least), known:
        engine = engine_of(ds_config(stage, dtype, {}), model)
        request = Request(ds_config(stage, dtype, {}), 12, "eager", gpus=engine.dp_world_size, gpu_memory=card)
        planned = Planner(copy.deepcopy(model.config)).layout(request).device_state
    states = engine.optimizer.states
    return engine.optimizer.ring.nbytes, planned, max(sum(t.nbytes for t in s.tensors.values()) for s in states)


class StandInAdam:
    """What `HostUpdate` uses of DeepSpeedCPUAdam, which would compile a C++ op (`make slow` takes the real one)."""

    def __init__(self, params: list[nn.Parameter], adamw_mode: bool) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": params}]
        self.state: dict[nn.Parameter, dict[str, Any]] = {}
        self._rule = Adam(adamw_mode)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["step"] += 1
                hyper = {key: value for key, value in group.items() if key != "params"}
                self._rule.update(param.data, param.grad, state, hyper, lr=group["lr"], step=state["step"])


def host_training(
    stage: int,
    dtype: str,
    rule: dict[str, Any],
    hift: dict[str, Any],
    real: bool = False,
    key: tuple[str, Any] = ("offload_optimizer", {"device": "cpu"}),
) -> dict[str, Any]:
    """Nine steps with updates on the device, then on the host, as `key` of "zero_optimization" asks for.

    Returns:
        `same`: whether weights and state have the same bits; `difference`: of the weights, at most; `kinds`: of the
        updates; `host`: bytes there.
    """
    weights, digests, facts = [], [], {"kinds": [], "host": []}
    for offload in ({}, dict([key])):
        stand_in = nullcontext() if real else mock.patch.object(host_update, "DeepSpeedCPUAdam", StandInAdam)
        with separate_host(), stand_in, mock.patch.object(state, "TILE_NUMEL", 1000):
            config = ds_config(stage, dtype, hift, optimizer=rule, zero_optimization=offload, gradient_clipping=0.5)
            engine = engine_of(config)
            run_steps(engine, 9)
        weights.append(torch.cat([weight.float().flatten() for weight in whole_weights(engine).values()]))
        slots = [tensor for block in engine.optimizer.states for tensor in block.slots.values()]
        digests.append(digest_of(weights_by_block(engine)) + digest(slots))
        facts["kinds"].append(type(engine.optimizer._step.host_update).__name__)
        facts["host"].append(engine.hift.host_bytes)
    return {
        **facts, "same": digests[0] == digests[1], "difference": (weights[0] - weights[1]).abs().max().item(),
    }  # fmt: skip


def moved_to_the_host(folder: str, stage: int, dtype: str) -> list[str]:
    """Fingerprints of weights and moments after 8 steps on the device, and after 5 there and 3 on the host, resumed."""
    found, stand_in = [], mock.patch.object(host_update, "DeepSpeedCPUAdam", StandInAdam)
    with separate_host(), stand_in:
        first = engine_of(ds_config(stage, dtype, {}))
        run_steps(first, 5)
        first.save_checkpoint(folder)
        offload = {"offload_optimizer": {"device": "cpu"}}
        second = engine_of(ds_config(stage, dtype, {}, zero_optimization=offload), small_llama(1))
        second.load_checkpoint(folder)
        for engine in (first, second):
            run_steps(engine, 3, start=5)
            slots = [tensor for block in engine.optimizer.states for tensor in block.slots.values()]
            found.append(digest_of(weights_by_block(engine)) + digest(slots))
    return found
