"""One configuration measured: peak memory beside the forecast, step time, losses. What the benchmark scripts share."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from hift_ds.memory.figures import Forecast
from hift_ds.memory.peak_meter import MemoryMeter
from hift_ds.memory.peaks import Report
from hift_ds.memory.request import parse_bytes
from hift_ds.recipes import training
from hift_ds.recipes.arguments import loss_tile_of
from hift_ds.recipes.display import Display
from hift_ds.recipes.planning import forecasts_of_run
from hift_ds.recipes.results import provenance, step_times
from hift_ds.recipes.tracing import require_trace, traced

_LEAST_TIMED = 10  # steps whose time is taken, where nobody says how many to make
_TRACED = 8  # steps at most: reading the trace of 34 of an 8B model took over a minute


def limit_memory(text: str | None) -> int | None:
    """Caps what this process may allocate on its card; the cap in bytes.

    Raises:
        ValueError: No size, no CUDA device, or more than the card has.
    """
    if text is None:
        return None
    limit = parse_bytes(text, "--gpu_memory_limit")
    if not torch.cuda.is_available() or get_accelerator().device_name() != "cuda":
        raise ValueError(f"--gpu_memory_limit {text!r}: caps CUDA's allocator, and this run is on a CPU; leave it out")
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if limit > total:
        raise ValueError(f"--gpu_memory_limit {text!r}: the card has {total / 2**30:.1f} GiB; name less")
    torch.cuda.set_per_process_memory_fraction(limit / total)
    return limit


def measure(args: argparse.Namespace, display: Display, limit: int | None) -> dict[str, Any]:
    """Trains `args.max_steps` steps (default: four cycles, or ten steps after two) and says what they took. Collective.

    `limit` is the cap on the card's memory, in bytes.

    The first two cycles run inside the meter (at stage 3 DeepSpeed prefetches from the second on). Times are of the
    whole cycles after these, because blocks differ and copies overlap from step to step; fewer steps have no time. Of
    full fine-tuning, which has no cycle, two steps are taken for one.
    """
    import hift_ds
    from hift_ds.recipes.setup import load_run

    if args.trace:
        require_trace(get_accelerator().device_name())
    run = load_run(args, random=args.random)
    engine, _, _, _ = hift_ds.initialize(model=run.model, model_parameters=run.model.parameters(), config=run.ds_config)
    cycle = max(2, engine.optimizer.rotation.steps_per_cycle) if args.hift else 2
    steps = args.max_steps or cycle * (2 + max(2, math.ceil(_LEAST_TIMED / cycle)))
    stream = _Watched(endless(run, args, engine))
    engine.train()  # from_pretrained leaves a model in evaluation
    evaluates = not (args.random or args.skip_evaluation)
    held_out = [training.held_out_loss(engine, run.data, run.micro_batch)] if evaluates else []
    # Of a step, over all ranks; padding included.
    tokens = run.micro_batch * args.seq_len * engine.gradient_accumulation_steps() * engine.dp_world_size
    with display.progress(steps, 0) as progress:
        with MemoryMeter(engine) as meter:
            losses, _ = _train(engine, stream, min(steps, 2 * cycle), 1, progress, tokens)
        more, seconds = _train(engine, stream, steps - len(losses), cycle, progress, tokens)
        if args.trace:
            count = min(cycle, _TRACED)
            trace = traced(lambda: _train(engine, stream, count, count, progress, tokens), count)
    if evaluates:
        held_out.append(training.held_out_loss(engine, run.data, run.micro_batch))
    report = meter.gather()
    forecast: Forecast | str | None = None
    if dist.get_rank() == 0:
        found = forecasts_of_run(engine, run.ds_config, args.seq_len, engine.device.type, padded=stream.padded)
        forecast = found if isinstance(found, str) else found[0]
    return _row(args, run, engine, report, forecast) | {
        "gpu_memory_limit": limit,
        "steps": steps,
        **step_times(seconds, cycle, tokens),
        **({"trace": trace} if args.trace else {}),
        "loss": [round(loss, 5) for loss in losses + more],
        "held_out_loss": held_out,
    }


def _train(
    engine: Any, stream: Iterator[dict[str, torch.Tensor]], steps: int, cycle: int, progress: Any, tokens: int
) -> tuple[list[float], list[float]]:
    """Losses of `steps` steps, and the seconds of one in the mean over each whole cycle. Collective.

    The host waits once a cycle, else it could not run ahead of the device as it does in training. What happens between
    two cycles is in the time of the second.
    """
    losses: list[float] = []
    seconds: list[float] = []
    _wait(engine)
    began = time.perf_counter()
    while len(losses) < steps:
        count = min(cycle, steps - len(losses))
        totals = torch.stack([training.optimizer_step(engine, stream)[0] for _ in range(count)])
        _wait(engine)
        now = time.perf_counter()
        each, began = (now - began) / count, now
        if count == cycle:
            seconds.append(each)
        dist.all_reduce(totals)
        for mean in totals.tolist():
            losses.append(mean)
            progress.update(mean, engine.get_lr()[0], "", tokens / each)
    return losses, seconds


def _wait(engine: Any) -> None:
    """Until forward, backward and update are done; copies of state may go on, for the next step waits for none."""
    if engine.device.type == "cuda":
        torch.cuda.current_stream(engine.device).synchronize()
    else:
        dist.barrier()


class _Watched:
    """Batches, and whether any had padding; a mask of ones is left out, as full rows need none."""

    def __init__(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        self._batches, self.padded = batches, False

    def __iter__(self) -> _Watched:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self._batches)
        mask = batch.get("attention_mask")
        if mask is not None and bool(mask.all()):
            batch = {key: tensor for key, tensor in batch.items() if key != "attention_mask"}
        elif mask is not None:
            self.padded = True
        return batch


def endless(run: Any, args: argparse.Namespace, engine: Any) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's batches for ever: of the data, or of random tokens."""
    if args.random:
        return _random_batches(run, args, engine)
    return training.batches(run.data, run.micro_batch, args.seed, 0, engine.device)


def _random_batches(run: Any, args: argparse.Namespace, engine: Any) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(args.seed * 1000 + dist.get_rank())
    while True:
        ids = torch.randint(0, run.model.config.vocab_size, (run.micro_batch, args.seq_len), generator=generator)
        batch = training.on_device({"input_ids": ids}, engine.device)
        yield {**batch, "labels": batch["input_ids"]}


def _row(
    args: argparse.Namespace, run: Any, engine: Any, report: Report, forecast: Forecast | str | None
) -> dict[str, Any]:
    peaks = [record.peak for record in report.ranks if record.peak is not None]
    peak = max(peaks, key=lambda sample: sample.allocated)
    row = {
        **provenance(engine.device),
        "status": "ok",
        "method": "hift" if args.hift else "full",
        "model": Path(args.model_name_or_path).name if Path(args.model_name_or_path).is_absolute()
        else args.model_name_or_path,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        "stage": engine.zero_optimization_stage(),
        "ranks": engine.dp_world_size,
        "nodes": len({record.node for record in report.ranks}),
        "dtype": str(engine.get_data_types()[0]).removeprefix("torch."),
        "optimizer": (run.ds_config.get("optimizer") or {}).get("type"),
        "sequence": args.seq_len,
        "micro_batch": run.micro_batch,
        "accumulation": engine.gradient_accumulation_steps(),
        "activation_checkpointing": args.gradient_checkpointing,
        "keep_layers": args.keep_layers,
        "loss_tile": loss_tile_of(args),
        "compile": args.compile,
        "blocks": len(engine.hift.blocks) if args.hift else None,
        "measured": {**asdict(peak), **report.of_allocator(), "how": report.kind},
        "config": {key: value for key, value in run.ds_config.items() if key != "tensorboard"},
        "report": report.to_json(),
    }
    if not args.hift and (run.ds_config.get("zero_optimization") or {}).get("offload_optimizer"):
        forecast = "what DeepSpeed's offloaded optimizer takes is not forecast"
    if isinstance(forecast, Forecast):
        return row | {"forecast": (forecast.worst if args.hift else forecast.full).to_json()}
    return row | {"forecast": forecast}
