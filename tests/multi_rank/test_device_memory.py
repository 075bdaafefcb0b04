"""Nothing proportional to the whole model is on the device but its weights: counted tensor by tensor.

The model has twelve equal blocks. Bounds are sums of named terms in bytes, all of the active block, a bucket, a tile or
one parameter; the test holds that they stay far below the whole model, so that one whole-model tensor would not fit.
"""

from __future__ import annotations

import copy
import gc
import time
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed import comm as dist
from hift_testing.delayed_lanes import lazy_copies
from hift_testing.device_meter import DeviceMeter, separate_host
from hift_testing.fingerprints import all_by_block, digest_of
from hift_testing.selection import slow
from hift_testing.training import DTYPES, cast_parameters, ds_config, engine_of, run_steps, small_llama
from torch import nn

from hift_ds.distributed import of_all_ranks
from hift_ds.memory.planner import Planner
from hift_ds.memory.request import Request
from hift_ds.state import ring
from hift_ds.state import unit_state as state
from hift_ds.state.ring import Lanes
from hift_ds.zero import states

pytestmark = pytest.mark.multi_rank

WIDTH, LAYERS, TILE, STEPS = 64, 12, 2048, 3
RING_BYTES = 3 * TILE * 12  # three tiles of fp32 master and moments
BUCKET = 20_000  # elements: the largest parameter has 16,384, so each weight matrix is a bucket of its own


TINY = 4096  # activations' gradients, and DeepSpeed's scalars
FACTORED = 2 * (64 + 256) + 64 + 256  # rows and columns of a layer's two matrices, and its biases: 1-D stay whole
ALWAYS = {"always_active": ["layers.0.2.weight"]}
RUNS = [
    *((stage, "fp32", {}) if stage in (0, 3) else slow(stage, "fp32", {}) for stage in range(4)),
    *(slow(stage, "bf16", {}) for stage in range(4)),
    slow(1, "bf16", {"accumulation": 2}), (2, "bf16", {"accumulation": 2}), slow(3, "bf16", {"hift": ALWAYS}),
    (1, "bf16", {"hift": ALWAYS}),
    (3, "bf16", {"start": "fp32"}),
    (2, "bf16", {"hift": {"kernel": "triton"}}),
]


class TwelveLayers(nn.Module):
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


def config_of(stage: int, dtype: str, hift: dict[str, Any], **extra: Any) -> dict[str, Any]:
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
    model = cast_parameters(TwelveLayers(), DTYPES[start or dtype])
    meter = DeviceMeter(model.parameters())
    facts: dict[str, Any] = {"given": meter.current}
    phases: dict[str, list[int]] = {"backward": [], "step": [], "after": []}
    with separate_host(), meter.measuring():
        extra = {"gradient_accumulation_steps": accumulation, **({"optimizer": rule} if rule else {})}
        engine = engine_of(config_of(stage, dtype, hift or {}, **extra), model)
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
    trained = [[state.shard for state in (*units, *always)] for units in engine.optimizer.block_states]
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


def bounds(
    stage: int, world: int, dtype: str, accumulation: int, facts: dict, fused: bool = False, factored: bool = False
) -> dict[str, float]:
    """Bytes over the model weights (for `backward`: over weights and activations) that each phase may reach."""
    element = 4 if dtype == "fp32" else 2
    gradient = 4 if accumulation > 1 else element  # fp32 between micro steps
    shard, block, parameter = facts["shard"], facts["block"], facts["parameter"]
    bucket = facts["bucket"] * element
    held_by_gloo = 2 * bucket if world > 1 else 0  # its threads free a collective's tensors up to 10 ms later
    tile = not fused and 4 * RING_BYTES // 3 // (8 if dtype == "fp32" else 12)  # of the gradient in fp32
    packed = bucket + (bucket / world if stage > 0 else 0)  # sent, and received
    if world == 1:
        backward = shard * gradient + parameter * element
    elif stage < 2:
        backward = block * gradient + shard * gradient + packed
    else:  # gradients wait until their bucket is full; the next parameter's may be there too
        backward = shard * gradient + bucket + parameter * element + packed
    if stage == 3:  # what DeepSpeed may gather (stage3_max_live_parameters), and a second bucket on its way
        backward += 2 * BUCKET * element + packed
    gathered = 2 * bucket if world > 1 and stage in (1, 2) else 0  # a bucket of new weights, and the one before
    # the first parameter in the engine's dtype beside the given one; its ZeRO-3 partition beside the whole
    init = parameter * element * (facts["given"] > facts["weights"] or stage == 3)
    if stage == 3:  # it broadcasts each parameter first, on one rank too, and gloo may still hold the one before
        init += parameter * element
    kept = facts["always"] + facts["ring"]
    moving = facts["always"] + RING_BYTES if factored else kept  # factored moments come beside the ring
    return {
        "init": facts["given"] + kept + init + TINY,
        "idle": facts["weights"] + kept + TINY,
        "backward": backward + held_by_gloo + TINY,
        "step": moving + shard * element + max(shard * gradient + tile, gathered) + held_by_gloo + TINY,
        "after": kept + TINY,
    }


def assert_within_bounds(
    stage: int, dtype: str, hift: dict[str, Any] | None = None, rule: dict[str, Any] | None = None, **run: Any
) -> None:
    """What is `measured` of such a run on this rank is within its bounds."""
    facts, world = measured(stage, dtype, hift, rule=rule, **run), dist.get_world_size()
    fused = hift is not None and hift.get("kernel") == "triton"
    allowed = bounds(stage, world, dtype, run.get("accumulation", 1), facts, fused, rule is not None)
    assert {phase: facts[phase] for phase in allowed if facts[phase] > allowed[phase]} == {}, (facts, allowed)
    if hift is None:
        whole = facts["given"] / (2 if "start" in run else 1)
        assert max(allowed["backward"], allowed["step"]) < whole / 2
    assert 0 < facts["ring"] <= RING_BYTES
    if rule is not None:
        per_element, factored = 4, LAYERS * 4 * FACTORED  # the master
    else:
        per_element, factored = (8 if dtype == "fp32" else 12), 0  # moments, and the master of bf16 weights
    parts = world if stage > 0 else 1
    assert facts["host"] == LAYERS * 33088 / parts * per_element + factored - facts["always"]


@pytest.mark.parametrize(("stage", "dtype", "keywords"), RUNS)
def test_device_holds_weights_and_one_blocks_share_on_two_ranks(two_ranks, stage, dtype, keywords):
    two_ranks.run(assert_within_bounds, stage, dtype, **keywords)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (2, "fp32"), (3, "bf16")])
def test_device_holds_weights_and_one_block_on_one_rank(one_rank, stage, dtype):
    one_rank.run(assert_within_bounds, stage, dtype)


def test_ring_bytes_hold_adafactor_s_factored_moments_too(one_rank):
    rule = {"type": "Adafactor", "params": {}}
    one_rank.run(assert_within_bounds, 0, "bf16", {"kernel": "triton"}, rule)


def same_training(stage: int, dtype: str, hift: dict[str, Any], rule: dict[str, Any] | None = None) -> None:
    """Weights and state after 9 steps: one memory and one tile; two memories and many tiles; the same with copies that
    happen at the last moment."""
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
        found.append(all_by_block(engine))
    together, apart, late = found
    assert together == apart == late


@pytest.mark.parametrize(
    ("stage", "dtype", "hift", "rule"),
    [
        slow(0, "bf16", {}, None),
        slow(1, "fp32", {"always_active": ["layers.0.mlp.down_proj"]}, None),
        slow(2, "bf16", {}, {"type": "Adafactor", "params": {"lr": 1e-2}}),
        (3, "bf16", {"inactive_state": "reset", "steps_per_block": 2, "layers_per_block": 3}, None),
        slow(3, "fp32", {}, {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}}),
    ],
)
def test_state_that_streams_in_small_tiles_and_late_copies_trains_bitwise_the_same(two_ranks, stage, dtype, hift, rule):
    two_ranks.run(same_training, stage, dtype, hift, rule)


def reset_run(stage: int, dtype: str) -> None:
    """Two cycles of turns of two steps, each begun with fresh state: tiles are loaded without their moments."""
    filled, load = [], ring._load

    def counting(sources: Any, targets: Any, initial: dict[str, float]) -> None:
        filled.append(bool(initial))
        load(sources, targets, initial)

    with separate_host(), mock.patch.object(ring, "_load", counting):
        engine = engine_of(ds_config(stage, dtype, {"inactive_state": "reset", "steps_per_block": 2}))
        settle = engine.optimizer.ring.settle
        with mock.patch.object(engine.optimizer.ring, "settle", side_effect=settle) as settled:
            run_steps(engine, 4 * len(engine.hift.blocks))
        assert settled.call_count == 0
        # of all turns, and those loaded ahead
        tiles = 2 * sum(len(block.tiles) for block in engine.optimizer.states) + len(engine.optimizer.ring._ahead)
    assert sum(filled) == tiles > 0


def test_state_that_begins_anew_is_filled_in_the_ring_and_the_host_does_not_wait(two_ranks):
    two_ranks.run(reset_run, 2, "bf16")


def skipped_reset(stage: int, dtype: str) -> None:
    """Weights and state, in one memory and in two, right after a step that would have begun a turn with fresh state but
    had no gradient, and at each of four steps later."""
    found, cycle, half = [], 4, LAYERS // 2
    for separate in (False, True):
        model = TwelveLayers()
        with separate_host(separate):
            keys = {"inactive_state": "reset", "steps_per_block": 2, "no_gradient": "skip", "layers_per_block": half}
            engine = engine_of(config_of(stage, dtype, keys), model)
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
                    marks.append(digest_of(all_by_block(engine)))
        found.append(marks)
    together, apart = found
    assert together == apart
    assert len(set(together)) == 5


def test_a_turn_that_begins_without_a_gradient_leaves_fresh_state_on_the_host_too(two_ranks):
    two_ranks.run(skipped_reset, 2, "bf16")


def three_steps_on(engine: Any, start: int) -> str:
    """A fingerprint of weights and state after them."""
    run_steps(engine, 3, start=start)
    return digest_of(all_by_block(engine))


def failed_reset(folder: str, stage: int, dtype: str) -> None:
    """Three steps after a checkpoint from the middle of a turn: gone on at once, and loaded after an update that failed
    at the start of the same block's next turn."""
    with separate_host():
        hift = {"inactive_state": "reset", "steps_per_block": 2, "layers_per_block": 3}
        engine = engine_of(ds_config(stage, dtype, hift))
        run_steps(engine, 1)
        engine.save_checkpoint(folder)
        gone_on = three_steps_on(engine, 1)
        cycle = 2 * len(engine.hift.blocks)
        run_steps(engine, cycle - 4, start=4)
        failing = mock.patch.object(engine.optimizer.ring, "visit", side_effect=MemoryError)
        with failing as failed, suppress(MemoryError):
            run_steps(engine, 1, start=cycle)
        assert failed.call_count == 1
        engine.load_checkpoint(folder)
        assert three_steps_on(engine, 1) == gone_on


def test_moments_that_are_loaded_after_a_failed_update_of_fresh_state_stay(two_ranks, tmp_path):
    two_ranks.run(failed_reset, str(tmp_path), 2, "bf16")


def same_ring(stage: int, dtype: str, tenth: int) -> None:
    """Bytes of the default ring on a card, of which it may take a tenth: the engine's, and a plan's."""
    card = 10 * tenth
    model = small_llama()
    known = mock.patch.object(states, "card_bytes", lambda device: card)
    with separate_host(tile=48), mock.patch.object(state, "RING_BYTES", 5_000), known:
        engine = engine_of(ds_config(stage, dtype, {}), model)
        request = Request(ds_config(stage, dtype, {}), 12, "eager", gpus=engine.dp_world_size, gpu_memory=card)
        planned = Planner(copy.deepcopy(model.config)).layout(request).device_state
    found = engine.optimizer.ring.nbytes
    assert found == planned
    block = max(sum(tensor.nbytes for tensor in block.tensors.values()) for block in engine.optimizer.states)
    assert 0.7 * min(tenth, block) <= found <= min(tenth, 1.1 * block)


@pytest.mark.parametrize("tenth", [8_000, 40_000, 10**6])
def test_engine_and_plan_make_the_same_ring_for_a_card(two_ranks, tenth):
    two_ranks.run(same_ring, 2, "bf16", tenth)


def same_resumption(folder: str, stage: int, dtype: str, hift: dict[str, Any]) -> None:
    """Weights and state in one memory, then in two with copies that happen at the last moment: a run
    that is saved goes on, goes back and goes on; another one loads it; a third, in its course, the weights alone."""
    found = []
    for separate, lanes in ((False, Lanes.of), (True, lazy_copies)):
        place = f"{folder}/{separate}"
        config = ds_config(stage, dtype, {**hift, "state": {"ring_bytes": 3 * 3 * 256} if separate else {}})
        with separate_host(separate, tile=48), mock.patch.object(Lanes, "of", lanes):
            first, second, third = (engine_of(config, small_llama(seed)) for seed in range(3))
            run_steps(first, 8)
            first.save_checkpoint(place)
            marks = [three_steps_on(first, 8)]
            first.load_checkpoint(place)
            marks.append(three_steps_on(first, 8))
            run_steps(second, 1)
            second.load_checkpoint(place)
            marks.append(three_steps_on(second, 8))
            run_steps(third, 7)
            third.load_checkpoint(place, load_module_only=True)
            marks.append(three_steps_on(third, 7))
        found.append(marks)
    together, late = found
    assert together == late
    assert late[0] == late[1] == late[2] != late[3]


@pytest.mark.parametrize(
    ("stage", "dtype", "hift"),
    [
        (2, "bf16", {}),
        slow(3, "bf16", {"inactive_state": "reset", "steps_per_block": 2}),
        slow(1, "fp32", {}),
    ],
)
def test_a_checkpoint_of_state_on_its_way_is_whole_and_what_was_loaded_ahead_is_forgotten(
    two_ranks, tmp_path, stage, dtype, hift
):
    two_ranks.run(same_resumption, str(tmp_path), stage, dtype, hift)


def loaded_ahead(stage: int, hift: dict[str, Any]) -> None:
    """After each of seven steps what the ring has loaded are the first tiles of the block whose turn comes, as many as
    it takes; after a checkpoint's reading of the state there is nothing."""
    with separate_host():
        engine = engine_of(ds_config(stage, "bf16", {**hift, "state": {"ring_bytes": 4 * 12 * state.TILE_MULTIPLE}}))
        optimizer = engine.optimizer
        for step in range(7):
            run_steps(engine, 1, start=step)
            tiles = optimizer.states[engine.hift.active_block].tiles
            ahead = [tile for tile, *_ in optimizer.ring._ahead]
            assert ahead == tiles[: len(optimizer.ring._slots)], step
        optimizer.state_dict()
        assert not optimizer.ring._ahead


@pytest.mark.parametrize(
    ("stage", "hift"), [(1, {}), (3, {"order": "top2down"}), (2, {"steps_per_block": 2, "order": "random"})]
)
def test_the_coming_block_s_first_tiles_are_on_their_way_after_each_step(two_ranks, stage, hift):
    two_ranks.run(loaded_ahead, stage, hift)


def one_unit_at_a_time(stage: int, dtype: str) -> None:
    """With updates in backward init, backward, step and rest take the device bytes of one layer, not of `m` layers.

    Gloo's threads, which hold a tensor a moment longer when they are late, can only add: one of three times is enough.
    """
    tries = []
    while len(tries) < 3:
        tries.append(error_of_one_unit(stage, dtype))
        if not any(of_all_ranks(tries[-1])):
            return
    raise AssertionError("\n".join(tries))


def error_of_one_unit(stage: int, dtype: str) -> str:
    """What is more than it may be, measured once; empty if nothing is. Collective."""
    world, found, errors = dist.get_world_size(), {}, []
    for layers in (1, 2, LAYERS):
        facts = measured(stage, dtype, {"update": "backward", "layers_per_block": layers})
        unit = {**facts, "shard": facts["shard"] // layers, "block": facts["block"] // layers}
        allowed = bounds(stage, world, dtype, 1, unit)
        allowed["backward"] += allowed["step"] - facts["ring"]  # the update is in it
        if world > 1 and stage in (1, 2):  # new weights of the unit above are on their way
            allowed["backward"] += 2 * facts["bucket"] * (4 if dtype == "fp32" else 2)
        more = {phase: facts[phase] for phase in allowed if facts[phase] > allowed[phase]}
        if more:
            errors.append(f"{layers} layers: {more}, of {allowed}")
        found[layers] = facts["init"], facts["idle"], facts["backward"], facts["after"]
    # What is still on its way, or held by gloo, when the next unit's gradients come; with one unit there is no next.
    before = 33088 * (4 if dtype == "fp32" else 2) if world > 1 else 4 * WIDTH * WIDTH * 4
    for layers in (2, LAYERS):
        for one, several in zip(found[1], found[layers], strict=True):
            if several > one + before + 4 * TINY:
                errors.append(f"{layers} layers: {found}")
    return "; ".join(errors)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), slow(1, "bf16"), (2, "bf16"), slow(2, "fp32"), (3, "fp32"), slow(3, "bf16")]
)
def test_updates_in_backward_hold_one_unit_on_the_device_whatever_layers_per_block_is(
    two_ranks, one_rank, stage, dtype
):
    for ranks in (two_ranks, one_rank):
        ranks.run(one_unit_at_a_time, stage, dtype)
