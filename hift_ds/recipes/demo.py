"""The end of `make demo`: HiFT's run beside full fine-tuning's, from the two summaries that launch/train.py wrote.

python -m hift_ds.recipes.demo outputs/demo    # reads hift/summary.json and full/summary.json below it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hift_ds.memory.peaks import write_json

WIDTH = 80
Summary = dict[str, Any]


def compare(hift: Summary, full: Summary) -> Table:
    """Loss, right answers, seconds and memory of both runs."""
    title = f"{hift['model']} on {hift['dataset']}: {examples(hift):,} examples, {hift['ranks']} ranks"
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for header in ("HiFT", "full fine-tuning"):
        table.add_column(header, justify="right")
    pair = (hift, full)
    table.add_row("held-out loss", *(" -> ".join(f"{loss:.2f}" for loss in run["held_out_loss"]) for run in pair))
    table.add_row("held-out questions answered right", *map(share_right, pair))
    table.add_row("seconds of training", *_beside(hift["training_seconds"], full["training_seconds"], "{:,.0f}"))
    if all("measured_peak" in run for run in pair):
        label = "peak memory of a rank, MiB: measured here"
        table.add_row(label, *_beside(hift["measured_peak"] / 2**20, full["measured_peak"] / 2**20, "{:,.0f}"))
    if "forecast_on_a_card" in hift:
        card = hift["forecast_on_a_card"]
        label = "forecast for GPUs"
        table.add_row(f"{label:>41}", *_beside(card["hift"] / 2**20, card["full"] / 2**20, "{:,.0f}"))
    return table


def examples(run: Summary) -> int:
    """Rows that a run was trained on, repeated ones counted again."""
    config = run["config"]
    per_step = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * run["ranks"]
    return run["steps"] * per_step


def share_right(run: Summary) -> str:
    """After training, as `22 of 24`."""
    asked = run["answers"]["after"]
    return f"{sum(one['right'] for one in asked)} of {len(asked)}"


def two_answers(hift: Summary, full: Summary) -> str:
    """The first held-out question that HiFT's model answers right, and the first that it does not."""
    pairs = list(zip(hift["answers"]["after"], full["answers"]["after"], strict=True))
    parts = []
    for right in (True, False):
        ours, other = next((pair for pair in pairs if pair[0]["right"] is right), (None, None))
        if ours is not None and other is not None:
            lines = {"right answer": ours["answer"], "HiFT": ours["reply"], "full": other["reply"]}
            answers = [f"{label:>14}: {' '.join(text.split())}" for label, text in lines.items()]
            parts.append(
                "\n".join([f"First that HiFT answers {'right' if right else 'wrong'}: {ours['question']}", *answers])
            )
    return "\n".join(parts)


def _beside(hift: float, full: float, form: str) -> tuple[str, str]:
    return f"{form.format(hift)} ({100 * (hift / full - 1):+.0f} %)", form.format(full)


def main(arguments: Sequence[str]) -> int:
    """Prints the table and writes both runs with it into summary.json."""
    folder = Path(arguments[0])
    hift, full = (json.loads((folder / name / "summary.json").read_text("utf-8")) for name in ("hift", "full"))
    if examples(hift) != examples(full):
        raise ValueError(f"{examples(hift)} examples beside {examples(full)}: the runs cannot be compared")
    console = Console(width=WIDTH, highlight=False, emoji=False, markup=False, record=True)
    console.print()
    console.print(compare(hift, full))
    console.print(f"\nQuestions in words that neither was trained on:\n{two_answers(hift, full)}")
    console.print(f"\nThe model that HiFT trained: {folder / 'hift' / 'model'}", soft_wrap=True)
    lines = console.export_text().splitlines()
    found = {"hift": hift, "full": full, "shown": [line.rstrip() for line in lines]}
    write_json(folder / "summary.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
