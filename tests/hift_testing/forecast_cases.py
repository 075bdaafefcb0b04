"""Cases on ranks: the peaks of each block and phase, forecast by the planner and measured around real steps."""

from __future__ import annotations

import copy
import gc
import time
from typing import Any
from unittest import mock

import torch
from deepspeed import comm as dist
from hift_testing.device_meter import DeviceMeter
from hift_testing.memory_cases import separate_host
from hift_testing.training import DTYPES, cast_parameters, ds_config, engine_of
from transformers import LlamaConfig, LlamaForCausalLM

from hift_ds.memory import choose
from hift_ds.memory.full import full_figures, full_moments
from hift_ds.memory.plan import Planner
from hift_ds.memory.request import Request
from hift_ds.recipes.planning import complete_config

ROWS, SEQ, VOCAB = 4, 64, 1000
LLAMA = dict(
    vocab_size=VOCAB, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
# Small enough that a layer's gradients take several buckets, and that stage 3 must let parameters go and fetch ahead.
ZERO = {
    "reduce_bucket_size": 60_000, "allgather_bucket_size": 60_000, "stage3_prefetch_bucket_size": 60_000,
    "stage3_max_live_parameters": 200_000, "stage3_max_reuse_distance": 100_000,
    "stage3_param_persistence_threshold": 200,
}  # fmt: skip


def forecast_and_measured(
    stage: int,
    dtype: str,
    hift: dict[str, Any] | None = None,
    attention: str = "sdpa",
    checkpointing: bool = False,
    rows: tuple[int, int] = (ROWS, SEQ),
    **extra: Any,
) -> dict[str, Any]:
    """Trains each block three times (at stage 3 DeepSpeed prefetches from the second turn on).

    Returns:
        `measured`: bytes by block and phase, the least of the last two cycles: gloo's threads, which hold a tensor a
        moment longer when they are late, can only add; `counted`: bytes handed to collectives in each block's last
        step. On rank 0 also the forecast of both, `forecast` and `network`, and `peaks`, the plan's, by block.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, use_cache=False, attn_implementation=attention))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    cast_parameters(model, DTYPES[dtype])
    config = ds_config(stage, dtype, {"state": {"ring_bytes": 3 * 12 * 4096}, **(hift or {})}, zero_optimization=ZERO)
    config |= {"train_micro_batch_size_per_gpu": rows[0], **extra}
    meter = DeviceMeter(model.parameters())
    with separate_host(tile=1024), meter.measuring():
        engine = engine_of(config, model)
        gc.collect()  # what DeepSpeed's set-up leaves in cycles
        measured, counted = _measure(engine, meter, cycles=3, rows=rows)
    world = engine.dp_world_size
    config = complete_config(config, None, None, None, world)
    request = Request(config, rows[1], attention, checkpointing, gpus=world, device_type="cpu", separate_host=True)
    facts = {"measured": measured, "counted": counted}
    return facts if dist.get_rank() else {**facts, **_forecast(request)}


def full_forecast_and_measured(
    stage: int, dtype: str, zero: dict[str, Any] | None = None, **extra: Any
) -> list[tuple[str, int, int]]:
    """The same for full fine-tuning by DeepSpeed's own optimizer: phase, forecast and measured bytes."""
    torch.manual_seed(0)
    model = cast_parameters(LlamaForCausalLM(LlamaConfig(**LLAMA, use_cache=False)), DTYPES[dtype])
    config = ds_config(stage, dtype, zero_optimization={**ZERO, **(zero or {})})
    config |= {"train_micro_batch_size_per_gpu": ROWS, **extra}
    meter = DeviceMeter(model.parameters())
    with meter:
        engine = engine_of(config, model)
        gc.collect()
        (measured,), _ = _measure(engine, meter, cycles=3, rows=(ROWS, SEQ))
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
    return [(phase, forecast[phase], measured[phase]) for phase in measured]


def _forecast(request: Request) -> dict[str, Any]:
    with separate_host(tile=1024):
        planner = Planner(LlamaConfig(**LLAMA))
        plan, layout = planner.plan(request), planner.layout(request)
        forecast = [
            {
                phase: moment.nbytes + layout.weights + layout.device_state
                for phase, moment in planner._traced(request, layout, index).moments.items()
            }
            for index in range(len(plan.blocks))
        ]
    return {
        "forecast": forecast, "peaks": [block.peak for block in plan.blocks],
        "network": [block.network for block in plan.blocks],
        "bucket": max(layout._packed(shard, bucket) for shard in layout.shards for bucket in shard.buckets(60_000)),
    }  # fmt: skip


def _measure(
    engine: Any, meter: DeviceMeter, cycles: int, rows: tuple[int, int]
) -> tuple[list[dict[str, int]], list[int]]:
    counter = _Traffic()
    found: dict[int, dict[str, int]] = {}
    sent: dict[int, int] = {}

    def note(phase: str) -> None:
        peaks[phase] = max(peaks.get(phase, 0), meter.peak)
        meter.restart()

    hift = getattr(engine, "hift", None)
    blocks = 1 if hift is None else len(hift.blocks)
    for step in range(cycles * blocks):
        block = 0 if hift is None else hift.active_block
        _let_gloo_go(meter)
        peaks: dict[str, int] = {}
        with counter:
            for micro in range(engine.gradient_accumulation_steps()):
                generator = torch.Generator().manual_seed(100 * step + micro)
                ids = torch.randint(0, VOCAB, rows, generator=generator)
                loss = engine(input_ids=ids, labels=ids).loss
                note("forward")
                engine.backward(loss)
                del loss
                note("backward")
                boundary = engine.is_gradient_accumulation_boundary()
                _let_gloo_go(meter)
                engine.step()
                if boundary:
                    note("update")
        if step >= blocks:
            before = found.get(block, peaks)
            found[block] = {phase: min(peak, before[phase]) for phase, peak in peaks.items()}
        sent[block] = counter.bytes
    return [found[index] for index in sorted(found)], [sent[index] for index in sorted(sent)]


def _let_gloo_go(meter: DeviceMeter) -> None:
    """Begins a phase when gloo's threads, which hold a collective's tensors a moment longer, have let go for 50 ms."""
    still = 0
    while still < 5:
        before = meter.current
        time.sleep(0.01)
        meter.restart()
        still = still + 1 if meter.current == before else 0


class _Traffic:
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


def chosen_blocks(memory: list[int], hift: dict[str, Any], optimizer: str | None = None) -> dict[str, Any]:
    """Trains two steps with `"layers_per_block": null` where each rank finds so much memory.

    Returns:
        `layers`: what the engine took; `alone`: the choice for the least memory of any rank; `blocks`: their number.
    """
    config = {**ds_config(2, "bf16", {"layers_per_block": None, "seq_len": SEQ, **hift}, zero_optimization=ZERO),
              "train_micro_batch_size_per_gpu": ROWS}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, use_cache=False))
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
    alone = choose.choose_layers_per_block(model, resolved, dist.get_world_size(), min(memory), apart=False)
    return {
        "layers": engine.hift_config.layers_per_block, "alone": alone.layers_per_block,
        "blocks": len(engine.hift.blocks),
    }  # fmt: skip


def choice_that_fails() -> str:
    """What this rank raises where rank 0 cannot choose."""
    config = ds_config(2, "bf16", {"layers_per_block": None}, zero_optimization=ZERO)
    with mock.patch.object(choose, "choose_layers_per_block", side_effect=ValueError("no choice")):
        try:
            engine_of(config, LlamaForCausalLM(LlamaConfig(**LLAMA, use_cache=False)))
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def explicit_blocks(blocks: list[list[str]]) -> int:
    """Number of blocks with `"layers_per_block": null` beside explicit ones; fails if anything is chosen."""
    config = ds_config(2, "bf16", {"layers_per_block": None, "blocks": blocks}, zero_optimization=ZERO)
    with mock.patch.object(choose, "memory_found", side_effect=AssertionError("nothing is to be chosen")):
        return len(engine_of(config, LlamaForCausalLM(LlamaConfig(**LLAMA, use_cache=False))).hift.blocks)
