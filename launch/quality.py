#!/usr/bin/env python3
"""How well HiFT learns beside full fine-tuning, LoRA and the last layer alone: real tasks, small pretrained models.

    python launch/quality.py --data DIR --quick       # ten minutes on 2 cores: does it work here?
    python launch/quality.py --data DIR               # everything: days on 2 cores; stop and start again at will
    python launch/quality.py --data DIR --tasks banking77 --methods full hift_m1 lora_r8
    python launch/quality.py --report                 # table and picture of the rows that are there

DIR holds banking77_{train,test}.csv, sst2_{train,test}.tsv, gsm8k_{train,test}.jsonl and tinyshakespeare.txt, as their
authors publish them. Results: rows.jsonl, a row as each run ends, and of these results.md and quality.png.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]  # a checkout need not be installed


def main() -> int:
    from hift_ds.recipes.setup import prepare_process, refuse

    prepare_process(verbose=False)
    args = _arguments()
    try:
        return work(args)
    except (ValueError, OSError) as error:
        return refuse("quality.py", error)


def work(args: argparse.Namespace) -> int:
    from hift_ds.recipes.display import Display
    from hift_ds.recipes.quality import Rows
    from hift_ds.recipes.quality_report import write_report
    from hift_ds.recipes.setup import own_folder

    folder = Path(args.output_dir) if args.report else own_folder(args.output_dir)
    rows, display = Rows(folder / "rows.jsonl"), Display(0)
    if not args.report:
        learn(args, rows, display)
    for path in write_report(rows.all, folder):
        display.print(f"wrote {path}", markup=False, soft_wrap=True)
    return 0


def learn(args: argparse.Namespace, rows: Any, display: Any) -> None:
    """Runs what the rows lack."""
    from deepspeed import comm as dist

    import hift_ds
    from hift_ds.recipes import quality_runs
    from hift_ds.recipes.quality import study
    from hift_ds.recipes.quality_plan import TASKS, Plan
    from hift_ds.recipes.quality_tasks import load_task
    from hift_ds.recipes.setup import quiet

    plan = Plan(tuple(args.methods), tuple(range(args.seeds)), args.rates, args.extensions, tuple(args.budgets))
    plan.check()
    quiet()
    hift_ds.init_distributed()
    if dist.get_world_size() > 1:
        raise ValueError(f"{dist.get_world_size()} ranks: its runs have one; start it with python, not with a launcher")
    for name in args.tasks:
        task = TASKS[name]
        task = replace(task, steps=args.steps or task.steps, num_test=args.test_rows or task.num_test)
        data = load_task(task, Path(args.data))
        display.print(f"{name}: {len(data.train)} rows to train on, {len(data.validation)} to choose rates by, "
                      f"{len(data.test)} to test on; {task.steps} steps of {task.micro_batch} rows")  # fmt: skip

        def train(settings: Any, task: Any = task, data: Any = data) -> Any:
            found = quality_runs.train(task, data, settings)
            display.print(_said(settings, found), markup=False, soft_wrap=True)
            return found

        def cost(settings: Any, task: Any = task, data: Any = data) -> Any:
            found = quality_runs.cost(task, data, settings)
            display.print(f"{settings['method']['name']}: {found['speed']:.2f} steps in the time of one of full")
            return found

        study(task, plan, rows, train, cost)


def _said(settings: dict[str, Any], found: dict[str, Any]) -> str:
    metrics = found["metrics"]
    loss = "diverged" if metrics["loss"] is None else f"loss {metrics['loss']:.4f}"
    return (
        f"{settings['method']['name']}, rate {settings['rate']:g}, seed {settings['seed']}, {settings['steps']} steps: "
        f"{settings['part']} {loss}, accuracy {100 * metrics['accuracy']:.1f} %; {found['seconds']:.0f} s"
    )


def _arguments() -> argparse.Namespace:
    from hift_ds.recipes.arguments import positive
    from hift_ds.recipes.quality_plan import METHODS, TASKS

    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder of the data files")
    add("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    add("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="METHOD",
        help=", ".join(METHODS))  # fmt: skip
    add("--seeds", type=positive, default=3, metavar="N")
    add("--steps", type=positive, metavar="N", help="of each run at equal steps (default: the task's own)")
    add("--rates", type=positive, default=3, metavar="N", help="rates in the grid that a method begins with")
    add("--extensions", type=int, default=3, metavar="N", help="rates added at most where the best is at the edge")
    add("--test_rows", type=positive, metavar="N", help="rows to test on (default: the task's own)")
    add("--budgets", nargs="+", choices=("steps", "seconds"), default=["steps", "seconds"])
    add("--output_dir", default="outputs/quality", metavar="DIR")
    add("--quick", action="store_true", help="a small part that takes ten minutes; other options are not used")
    add("--report", action="store_true", help="run nothing; table and picture of the rows that are there")
    args = parser.parse_args()
    if args.quick:
        args = argparse.Namespace(**{**vars(args), **QUICK})
    if not args.report and not args.data:
        parser.error("--data: name the folder of the data files")
    return args


QUICK = {
    "tasks": ["banking77"], "methods": ["full", "hift_m1", "lora_r8", "last_layer"], "seeds": 1, "steps": 48,
    "rates": 2, "extensions": 0, "test_rows": 200, "budgets": ["steps"],
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
