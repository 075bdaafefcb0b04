#!/usr/bin/env python3
"""How long training stands still for a checkpoint: saves that wait, and saves in the background while steps go on.

    deepspeed launch/benchmark_save.py --hift                        # the sample model and data
    deepspeed launch/benchmark_save.py --hift --random --model_name_or_path config.json --results save.json

Takes the options of launch/train.py; the checkpoints go below --output_dir and are removed. Needs no GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]  # a checkout need not be installed
ROUNDS = 3


def main() -> int:
    from hift_ds.recipes.arguments import add_benchmark_arguments
    from hift_ds.recipes.setup import run_script

    return run_script(benchmark, __doc__, HERE / "demo.json", add_benchmark_arguments)


def benchmark(args: argparse.Namespace) -> None:
    """Saves in both ways, in turn, `ROUNDS` times after one that is not counted. Collective."""
    import hift_ds
    from hift_ds.memory.peaks import write_json
    from hift_ds.recipes.benchmark import endless
    from hift_ds.recipes.display import Display
    from hift_ds.recipes.results import provenance
    from hift_ds.recipes.setup import load_run

    hift_ds.init_distributed()
    if not args.hift:
        raise ValueError("--hift: is missing; saves in the background are HiFT's")
    display, run = Display(int(os.environ["RANK"])), load_run(args, random=args.random)
    engine, _, _, _ = hift_ds.initialize(model=run.model, model_parameters=run.model.parameters(), config=run.ds_config)
    stream, folder = endless(run, args, engine), Path(args.output_dir, "benchmark_save")
    rounds = [_round(engine, stream, folder) for _ in range(1 + ROUNDS)][1:]
    if display.active:
        files = [path for path in (folder / "waits").iterdir() if path.is_file()]
        row = {
            **provenance(engine.device), "model": args.model_name_or_path, "ranks": engine.dp_world_size,
            "stage": engine.zero_optimization_stage(), "blocks": len(engine.hift.blocks),
            "bytes": sum(path.stat().st_size for path in files), "rounds": rounds,
            **{name: statistics.median(one[name] for one in rounds) for name in rounds[0]},
        }  # fmt: skip
        shutil.rmtree(folder)
        display.print(
            f"{row['bytes'] / 2**20:,.0f} MiB: a save that waits {row['waits_s']:.2f} s, one in the background "
            f"{row['stalls_s']:.2f} s; steps meanwhile {row['step_meanwhile_s']:.2f} s in the place of "
            f"{row['step_s']:.2f} s, {row['steps_meanwhile']:.0f} of them", markup=False,
        )  # fmt: skip
        if args.results:
            write_json(Path(args.results), row)


def _round(engine: Any, stream: Any, folder: Path) -> dict[str, float]:
    from hift_ds.recipes import training

    def seconds(work: Any) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def step() -> None:
        float(training.optimizer_step(engine, stream)[0])  # waits for the device

    alone = [seconds(step) for _ in range(4)]
    waits = seconds(lambda: engine.save_checkpoint(str(folder), tag="waits"))
    stalls = seconds(lambda: engine.save_checkpoint(str(folder), tag="background", asynchronous=True))
    meanwhile: list[float] = []
    while not meanwhile or _goes_on(engine):
        meanwhile.append(seconds(step))
    engine.finish_saving()
    return {
        "waits_s": waits, "stalls_s": stalls, "step_s": statistics.median(alone),
        "step_meanwhile_s": statistics.median(meanwhile), "steps_meanwhile": float(len(meanwhile)),
    }  # fmt: skip


def _goes_on(engine: Any) -> bool:
    """Whether any rank still writes; the same on all. Collective."""
    from hift_ds.distributed import of_all_ranks

    return any(of_all_ranks(engine.saves_in_background))


if __name__ == "__main__":
    sys.exit(main())
