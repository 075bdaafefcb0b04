#!/usr/bin/env python3
"""The cluster memory benchmark: what one configuration takes, measured on every rank, beside the forecast.

    deepspeed launch/benchmark_memory.py --hift                        # the sample model and data
    deepspeed launch/benchmark_memory.py                               # the same, full fine-tuning
    deepspeed launch/benchmark_memory.py --hift --random --model_name_or_path config.json --seq_len 1024 --micro_batch 1
    deepspeed --hostfile hosts launch/benchmark_memory.py --hift --deepspeed_config ds_configs/zero3_bf16.json
    mpirun -np 8 python launch/benchmark_memory.py --hift

Takes the options of launch/train.py. Every block trains at least twice; step times are of the whole cycles after that.
Writes a dated JSON file into launch/results/, with every rank's peaks by block, phase and role, step times and losses.
Exit code 3: out of memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]  # a checkout need not be installed


def main() -> int:
    from hift_ds.recipes.arguments import add_benchmark_arguments, add_trace_argument
    from hift_ds.recipes.setup import run_script

    return run_script(benchmark, __doc__, HERE / "demo.json", add_benchmark_arguments, add_trace_argument)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, shows and writes. Collective."""
    import hift_ds
    from hift_ds.distributed import agree
    from hift_ds.memory.peaks import write_json
    from hift_ds.recipes.benchmark import limit_memory, measure
    from hift_ds.recipes.display import Display

    hift_ds.init_distributed()
    display = Display(int(os.environ["RANK"]))
    limit = agree(lambda: limit_memory(args.gpu_memory_limit))
    row = measure(args, display, limit)
    if display.active:
        show(row, display)
        path = Path(args.results) if args.results else HERE / "results" / f"{row['date']}_memory_{name_of(row)}.json"
        write_json(path, row)
        display.print(f"wrote {path}", markup=False, soft_wrap=True)
    return row


def show(row: dict[str, Any], display: Any) -> None:
    """The table of all ranks, and the forecast beside the measured peak."""
    from hift_ds.memory.figures import mib
    from hift_ds.memory.peaks import Report

    report = Report.from_json(row["report"])
    display.print(report.table())
    forecast = row["forecast"]
    if isinstance(forecast, dict):
        peak, measured = forecast["peak"], row["measured"]["allocated"]
        off = 100 * (peak / measured - 1)
        display.print(f"forecast {mib(peak)} MiB, measured {mib(measured)} MiB ({off:+.1f} %)")
    else:
        display.print(f"no forecast: {forecast}", markup=False)
    if row["step_ms"] is not None:
        step = f"step {row['step_ms']['p50']:,.0f} ms, {row['tokens_per_s']:,.0f} tokens/s"
        display.print(f"{step} (whole cycles, {row['timed_steps']} steps)")
    else:
        display.print(f"no time of a step: {row['steps']} steps are not three cycles; more --max_steps")
    if "trace" in row:
        trace = row["trace"]
        kernels, copies, idle = (trace[key] for key in ("kernels_ms", "exposed_copies_ms", "idle_ms"))
        display.print(f"traced step, ms: kernels {kernels:,.0f}, copies beside none {copies:,.0f}, idle {idle:,.0f}")
        copied = [trace[way]["bytes"] / 1e9 for way in ("to_device", "to_host")]
        display.print(f"copied in a step: {copied[0]:,.2f} GB to the device, {copied[1]:,.2f} GB to the host")


def name_of(row: dict[str, Any]) -> str:
    """Short name of a configuration, for files."""
    method = f"hift_{row['blocks']}blocks" if row["method"] == "hift" else "full"
    model = Path(row["model"]).stem
    rows = f"{row['micro_batch']}x{row['sequence']}"
    return f"{model}_{method}_zero{row['stage']}_{row['dtype']}_{row['ranks']}ranks_{rows}"


if __name__ == "__main__":
    sys.exit(main())
