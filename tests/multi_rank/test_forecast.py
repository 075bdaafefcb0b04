"""What the planner forecasts is what real steps take: peaks by block and phase, and bytes handed to collectives."""

from __future__ import annotations

import copy
import gc
import time
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed import comm as dist
from hift_testing.device_meter import DeviceMeter, separate_host
from hift_testing.measured_model import LLAMA, ROWS, SEQ, ZERO, measured_llama, tokens_of
from hift_testing.messages import error_of
from hift_testing.selection import slow
from hift_testing.training import DTYPES, cast_parameters, ds_config, engine_of
from transformers import LlamaConfig

from hift_ds.memory import choose
from hift_ds.memory.full import full_figures, full_moments
from hift_ds.memory.planner import Planner
from hift_ds.memory.request import Request
from hift_ds.recipes.planning import complete_config

pytestmark = pytest.mark.multi_rank

TOLERANCES = {"forward": 0.005, "backward": 0.005, "update": 0.01}  # of the bytes on the device: scalars
SMALL = 2048  # bytes of norms and flags that collectives carry beside gradients and weights


def measure(
    engine: Any, meter: DeviceMeter, rows: tuple[int, int] = (ROWS, SEQ)
) -> tuple[list[dict[str, int]], list[int]]:
    """Trains each block three times (at stage 3 DeepSpeed prefetches from the second turn on).

    Returns:
        Bytes by block and phase, the least of the last two cycles: gloo's threads, which hold a tensor a moment longer
        when they are late, can only add; and bytes handed to collectives in each block's last step.
    """
    counter = Traffic()
    found: dict[int, dict[str, int]] = {}
    sent: dict[int, int] = {}

    def note(phase: str) -> None:
        peaks[phase] = max(peaks.get(phase, 0), meter.peak)
        meter.restart()

    hift = getattr(engine, "hift", None)
    blocks = 1 if hift is None else len(hift.blocks)
    for step in range(3 * blocks):
        block = 0 if hift is None else hift.active_block
        let_gloo_go(meter)
        peaks: dict[str, int] = {}
        with counter:
            for micro in range(engine.gradient_accumulation_steps()):
                batch = tokens_of(100 * step + micro, rows)  # alive until the next, as a script's
                loss = engine(**batch).loss
                note("forward")
                engine.backward(loss)
                del loss
                note("backward")
                boundary = engine.is_gradient_accumulation_boundary()
                let_gloo_go(meter)
                engine.step()
                if boundary:
                    note("update")
        if step >= blocks:
            before = found.get(block, peaks)
            found[block] = {phase: min(peak, before[phase]) for phase, peak in peaks.items()}
        sent[block] = counter.bytes
    return [found[index] for index in sorted(found)], [sent[index] for index in sorted(sent)]


def let_gloo_go(meter: DeviceMeter) -> None:
    """Begins a phase when gloo's threads, which hold a collective's tensors a moment longer, have let go for 50 ms."""
    still = 0
    while still < 5:
        before = meter.current
        time.sleep(0.01)
        meter.restart()
        still = still + 1 if meter.current == before else 0


class Traffic:
    """Counts, inside `with`, the bytes that this rank hands to collectives: the whole buffer of a gather or scatter."""

    WHOLE = {"all_reduce": 0, "reduce_scatter_tensor": 1, "all_gather_into_tensor": 0}

    def __enter__(self) -> None:
        self.bytes = 0
        self._originals = {name: getattr(dist, name) for name in self.WHOLE}
        for name, position in self.WHOLE.items():
            self._set(name, self._counting(self._originals[name], position))

    def __exit__(self, *_: Any) -> None:
        for name, original in self._originals.items():
            self._set(name, original)

    def _set(self, name: str, function: Any) -> None:
        setattr(dist, name, function)
        setattr(dist.comm, name, function)  # ZeRO-3 gathers through the module behind the package

    def _counting(self, function: Any, position: int) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = args[position] if len(args) > position else list(kwargs.values())[position - len(args)]
            self.bytes += tensor.nbytes
            return function(*args, **kwargs)

        return counted


def assert_forecast(
    stage: int,
    dtype: str,
    hift: dict[str, Any] | None = None,
    attention: str = "sdpa",
    checkpointing: bool = False,
    rows: tuple[int, int] = (ROWS, SEQ),
    **extra: Any,
) -> None:
    """Trains, and holds the planner's peaks and its bytes of collectives beside those that were counted."""
    torch.manual_seed(0)
    model = measured_llama(attn_implementation=attention)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    cast_parameters(model, DTYPES[dtype])
    config = ds_config(stage, dtype, {"state": {"ring_bytes": 3 * 12 * 4096}, **(hift or {})}, zero_optimization=ZERO)
    config |= {"train_micro_batch_size_per_gpu": rows[0], **extra}
    meter = DeviceMeter(model.parameters())
    with separate_host(tile=1024), meter.measuring():
        engine = engine_of(config, model)
        gc.collect()  # what DeepSpeed's set-up leaves in cycles
        measured, counted = measure(engine, meter, rows)
    world = engine.dp_world_size
    config = complete_config(config, None, None, None, world)
    request = Request(config, rows[1], attention, checkpointing, gpus=world, device_type="cpu", separate_host=True)
    with separate_host(tile=1024):
        planner = Planner(LlamaConfig(**LLAMA))
        plan, layout = planner.forecast(request), planner.layout(request)
        traces = [planner._traced(request, layout, index).moments for index in range(len(plan.blocks))]
    beside = dict.fromkeys(TOLERANCES, 0)
    if world > 1 and stage in (1, 2):  # gloo's threads may still hold the update's last bucket when the next is there
        buckets = [layout._packed(shard, bucket) for shard in layout.units for bucket in shard.buckets(60_000)]
        beside["update"] = max(buckets)
    for block, moments, peaks, sent in zip(plan.blocks, traces, measured, counted, strict=True):
        for phase, tolerance in TOLERANCES.items():
            forecast = moments[phase].nbytes + layout.weights + layout.device_state
            allowed = tolerance * peaks[phase]
            assert -allowed <= peaks[phase] - forecast <= allowed + beside[phase], (block.name, phase)
        assert abs(block.peak - max(peaks.values())) <= 0.01 * block.peak, block.name
        assert 0 <= sent - block.network <= SMALL if world > 1 else block.network == 0, block.name


IN_BACKWARD = {"update": "backward", "layers_per_block": 100}


@pytest.mark.parametrize(
    ("stage", "dtype", "keywords"),
    [
        slow(0, "fp32", {}),
        slow(1, "bf16", {"gradient_accumulation_steps": 2}),
        (2, "bf16", {"hift": {"always_active": ["layers.2.mlp.down_proj"], "layers_per_block": 2}}),
        slow(2, "fp32", {"checkpointing": True, "attention": "eager"}),
        slow(3, "bf16", {"hift": {"order": "top2down"}}),
        slow(3, "bf16", {"gradient_accumulation_steps": 2, "hift": {"order": "top2down"}}),
        (2, "bf16", {"hift": {"update": "backward", "layers_per_block": 2}}),
        slow(0, "fp32", {"hift": {"update": "backward", "layers_per_block": 100}}),
        slow(3, "bf16", {"hift": {"update": "backward", "layers_per_block": 100}}),
        slow(1, "bf16", {"hift": {"update": "backward", "layers_per_block": 2}, "gradient_accumulation_steps": 2}),
        slow(2, "bf16", {"hift": {**IN_BACKWARD, "accumulate": "host"}, "gradient_accumulation_steps": 2}),
        slow(2, "bf16", {"optimizer": {"type": "Adafactor", "params": {"lr": 1e-2}}, "hift": {"state": {}}}),
    ],
)
def test_forecast_is_what_two_ranks_take(two_ranks, stage, dtype, keywords):
    two_ranks.run(assert_forecast, stage, dtype, **keywords)


BATCHES = {"activations": (ROWS, SEQ), "gradients": (1, 4)}


@pytest.mark.parametrize(
    ("stage", "dtype", "weighs_more"),
    [
        slow(0, "bf16", "gradients"), slow(3, "fp32", "activations"), slow(0, "bf16", "activations"),
        slow(3, "fp32", "gradients"),
    ],
)  # fmt: skip
def test_forecast_is_what_one_rank_takes_whatever_weighs_more(one_rank, stage, dtype, weighs_more):
    """Here no gloo holds or copies buckets, as its reduce-scatter does."""
    one_rank.run(assert_forecast, stage, dtype, rows=BATCHES[weighs_more])


TORCH = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
FUSED = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}}
ADAGRAD = {"type": "Adagrad", "params": {"lr": 1e-3, "weight_decay": 0.1}}
SGD = {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}}


def assert_full_forecast(stage: int, dtype: str, zero: dict[str, Any] | None = None, **extra: Any) -> None:
    """The same for full fine-tuning by DeepSpeed's own optimizer."""
    torch.manual_seed(0)
    model = cast_parameters(measured_llama(), DTYPES[dtype])
    config = ds_config(stage, dtype, zero_optimization={**ZERO, **(zero or {})})
    config |= {"train_micro_batch_size_per_gpu": ROWS, **extra}
    meter = DeviceMeter(model.parameters())
    with meter:
        engine = engine_of(config, model)
        gc.collect()
        (measured,), _ = measure(engine, meter)
    config = complete_config(config, None, None, None, engine.dp_world_size)
    request = Request(config, SEQ, gpus=engine.dp_world_size, device_type="cpu")
    planner = Planner(LlamaConfig(**LLAMA))
    layout = planner.layout(request)
    events = planner.events(request, tuple(layout.params))
    moments = list(full_moments(layout, events, layout.gathered(events)))
    figures, _ = full_figures(layout, events)
    forecast = {
        phase: layout.weights + figures.state + max(m.nbytes for m in moments if m.phase == phase) for phase in measured
    }
    assert figures.peak == max(forecast.values())
    for phase, peak in measured.items():
        assert -0.01 <= forecast[phase] / peak - 1 <= 0.015, phase


@pytest.mark.parametrize(
    ("stage", "dtype", "optimizer", "micro_steps", "zero"),
    [
        (1, "fp32", FUSED, 1, {"overlap_comm": True}), (2, "bf16", TORCH, 1, {}),
        slow(0, "fp32", SGD, 1, {}), slow(3, "fp32", TORCH, 1, {"reduce_bucket_size": 500_000}),
        slow(0, "bf16", TORCH, 1, {}), slow(0, "fp32", TORCH, 2, {}), slow(1, "bf16", TORCH, 2, {}),
        slow(1, "fp32", FUSED, 1, {}), slow(1, "bf16", ADAGRAD, 1, {}),
        slow(2, "bf16", FUSED, 1, {"overlap_comm": True}), slow(2, "fp32", TORCH, 2, {}), slow(3, "bf16", FUSED, 2, {}),
        slow(3, "fp32", TORCH, 1, {}),
    ],
)  # fmt: skip
def test_forecast_of_full_fine_tuning_is_what_deepspeeds_own_optimizers_take(
    two_ranks, stage, dtype, optimizer, micro_steps, zero
):
    more = {"optimizer": optimizer, "gradient_accumulation_steps": micro_steps, "zero": zero}
    two_ranks.run(assert_full_forecast, stage, dtype, **more)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), slow(1, "fp32"), slow(2, "bf16"), slow(3, "bf16")])
def test_forecast_of_full_fine_tuning_is_what_it_takes_on_one_rank(one_rank, stage, dtype):
    one_rank.run(assert_full_forecast, stage, dtype, optimizer=TORCH)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_forecast_of_full_fine_tuning_is_what_deepspeeds_compiled_adam_takes(two_ranks, compiled_adam, stage):
    two_ranks.run(assert_full_forecast, stage, "bf16")


def chosen_blocks(memory: list[int], optimizer: str | None) -> tuple[int, int]:
    """Trains two steps with `"layers_per_block": null` where each rank finds so much memory: the choice is that for the
    least memory of any rank. Returns it, and the number of blocks."""
    config = {**ds_config(2, "bf16", {"layers_per_block": None, "seq_len": SEQ}, zero_optimization=ZERO),
              "train_micro_batch_size_per_gpu": ROWS}  # fmt: skip
    model = measured_llama()
    client = {}
    if optimizer is not None:
        config.pop("optimizer")
        client["optimizer"] = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3)
    with mock.patch.object(choose, "memory_found", lambda: memory[dist.get_rank()]):
        engine = engine_of(copy.deepcopy(config), model, **client)
    for _ in range(2):
        ids = torch.zeros(ROWS, SEQ, dtype=torch.int64)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    resolved = {**config, "gradient_accumulation_steps": 1, "optimizer": {"type": optimizer or "AdamW"}}
    alone = choose.choose_layers_per_block(model, resolved, dist.get_world_size(), min(memory), "cpu")
    layers = engine.hift_config.layers_per_block
    assert layers == alone.layers_per_block
    return layers, len(engine.hift.blocks)


MIB = 2**20


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [None, "SGD"])
def test_null_takes_the_largest_blocks_that_fit_the_rank_with_the_least_memory(two_ranks, optimizer):
    found = [
        two_ranks.run(chosen_blocks, memory, optimizer)
        for memory in ([10**12, 8 * MIB], [10**12, 18 * MIB], [10**12, 10**12])
    ]
    assert all(first == second for first, second in found)
    numbers = [first[0] for first, _ in found]
    assert numbers[0] == 1 and numbers == sorted(numbers)
    assert found[-1][0] == (6, 1)


def choice_that_fails() -> str:
    """What this rank raises where rank 0 cannot choose."""
    config = ds_config(2, "bf16", {"layers_per_block": None}, zero_optimization=ZERO)
    with mock.patch.object(choose, "choose_layers_per_block", side_effect=ValueError("no choice")):
        return error_of(lambda: engine_of(config, measured_llama()))


def test_a_choice_that_fails_on_rank_0_fails_on_every_rank(two_ranks):
    assert two_ranks.run(choice_that_fails) == [
        "ValueError: no choice", "RuntimeError: rank 0 failed: ValueError: no choice",
    ]  # fmt: skip


def explicit_blocks() -> None:
    """`"layers_per_block": null` beside explicit blocks."""
    blocks = [["embed", "layers.[01]"], ["layers.[23]", "model.norm", "lm_head"]]
    config = ds_config(2, "bf16", {"layers_per_block": None, "blocks": blocks}, zero_optimization=ZERO)
    with mock.patch.object(choose, "memory_found", side_effect=AssertionError("nothing is to be chosen")):
        assert len(engine_of(config, measured_llama()).hift.blocks) == 2


def test_explicit_blocks_leave_nothing_to_choose(two_ranks):
    two_ranks.run(explicit_blocks)
