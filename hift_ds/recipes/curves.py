"""Held-out loss by examples and by seconds: what launch/curves.sh still has to run, and the table and picture of all.

    python -m hift_ds.recipes.curves OUT           # a line for each run that follows from those that are there
    python -m hift_ds.recipes.curves OUT --draw    # curves.csv, results.md and curves.png in OUT

A run is the folder OUT/runs/CONTESTANT,RATE,STEPS with the summary of launch/train.py; a contestant is "full" or how
many layers a block has. Seconds are steps times the mean step of OUT/speed/results.csv, whose runs took turns: so they
do not depend on what else the machine did while a curve was trained.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FULL, ONE_BLOCK = "full", "100"
CONTESTANTS = {
    FULL: "full fine-tuning", ONE_BLOCK: "HiFT, 1 block", "8": "HiFT, 4 blocks", "4": "HiFT, 8 blocks",
    "1": "HiFT, 31 blocks",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A curve: held-out loss by steps."""

    contestant: str
    rate: str
    steps: int
    losses: tuple[tuple[int, float], ...]
    examples_per_step: int

    @property
    def last(self) -> float:
        """The loss at the end; infinite where it diverged."""
        loss = self.losses[-1][1]
        return loss if math.isfinite(loss) else math.inf


def read_runs(folder: Path) -> list[Run]:
    """All runs that have ended."""
    runs = []
    for path in sorted(folder.glob("runs/*/summary.json")):
        contestant, rate, steps = path.parent.name.split(",")
        found = json.loads(path.read_text("utf-8"))
        before, after = found["held_out_loss"]
        on_the_way = {point["step"]: point["held_out_loss"] for point in found["curve"]}
        losses = {0: before, **on_the_way, int(steps): after}
        examples = found["config"]["train_micro_batch_size_per_gpu"] * found["ranks"]
        runs.append(Run(contestant, rate, int(steps), tuple(losses.items()), examples))
    return runs


def step_seconds(folder: Path) -> dict[str, float]:
    """Mean seconds of a step in fp32, by contestant."""
    with (folder / "speed" / "results.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["dtype"] == "fp32" and row["status"] == "ok"]
    tokens = {row["layers_per_block"] or row["method"]: float(row["tokens_per_s"]) for row in rows}
    per_step = {name: 1 / rate for name, rate in tokens.items()}
    row = rows[0]
    count = int(row["sequence"]) * int(row["micro_batch"]) * int(row["ranks"]) * int(row["accumulation"])
    return {name: count * seconds for name, seconds in per_step.items()}


def chosen(runs: Sequence[Run], contestant: str, steps: int) -> Run:
    """The contestant's run with the least loss at the end of so many steps."""
    return min((run for run in runs if (run.contestant, run.steps) == (contestant, steps)), key=lambda run: run.last)


def following(runs: Sequence[Run], seconds: dict[str, float]) -> list[tuple[str, str, int]]:
    """Contestant, rate and steps: one block at full fine-tuning's rate, and each of HiFT's for its seconds."""
    full = _full(runs)
    found = [(ONE_BLOCK, full.rate, full.steps)]
    for name in CONTESTANTS:
        if name != FULL:
            rate = full.rate if name == ONE_BLOCK else chosen(runs, name, full.steps).rate
            found.append((name, rate, round(full.steps * seconds[FULL] / seconds[name])))
    return found


def _full(runs: Sequence[Run]) -> Run:
    return min((run for run in runs if run.contestant == FULL), key=lambda run: run.last)


def write_all(folder: Path) -> None:
    """The points, the table and the picture."""
    runs, seconds = read_runs(folder), step_seconds(folder)
    full = _full(runs)
    equal_steps = {name: chosen(runs, name, full.steps) for name in CONTESTANTS}
    by_key = {(run.contestant, run.rate, run.steps): run for run in runs}
    equal_seconds = {FULL: full} | {name: by_key[name, rate, steps] for name, rate, steps in following(runs, seconds)}
    with (folder / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("contestant", "rate", "steps", "step", "examples", "seconds", "held_out_loss"))
        for run in runs:
            for step, loss in run.losses:
                place = (step, step * run.examples_per_step, round(step * seconds[run.contestant], 2))
                writer.writerow((CONTESTANTS[run.contestant], run.rate, run.steps, *place, round(loss, 5)))
    (folder / "results.md").write_text(markdown(runs, equal_steps, equal_seconds, seconds), encoding="utf-8")
    draw(equal_steps, equal_seconds, seconds, folder / "curves.png")


def markdown(
    runs: Sequence[Run], equal_steps: dict[str, Run], equal_seconds: dict[str, Run], seconds: dict[str, float]
) -> str:
    """A line for each contestant: its rates with their losses, and both budgets."""
    full = equal_steps[FULL]
    head = (
        "", "step, s", "held-out loss by rate", f"after {full.steps} steps",
        f"after {full.steps * seconds[FULL]:.0f} s", "steps in these",
    )  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for name, label in CONTESTANTS.items():
        tried = [run for run in runs if (run.contestant, run.steps) == (name, full.steps)]
        rates = ", ".join(f"{run.rate}: {_said(run.last)}" for run in sorted(tried, key=lambda run: float(run.rate)))
        long = equal_seconds[name]
        losses = (f"{equal_steps[name].last:.4f}", f"{long.last:.4f}")
        lines.append((label, f"{seconds[name]:.2f}", rates, *losses, str(long.steps)))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _said(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def draw(
    equal_steps: dict[str, Run], equal_seconds: dict[str, Run], seconds: dict[str, float], path: Path
) -> None:
    """Two panels, by examples and by seconds; each curve has its name at its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, "examples", [(run, run.examples_per_step) for run in equal_steps.values()])
    _panel(right, "seconds, by the mean step", [(run, seconds[run.contestant]) for run in equal_seconds.values()])
    left.set_ylabel("loss on held-out answers")
    figure.savefig(path)


def _panel(axes: Any, what: str, curves: Sequence[tuple[Run, float]]) -> None:
    ends = sorted(((run.last, run, scale) for run, scale in curves), key=lambda end: end[0])
    for run, scale in curves:
        colour = f"C{list(CONTESTANTS).index(run.contestant)}"
        style = "--" if run.contestant == ONE_BLOCK else "-"  # it lies on full fine-tuning's curve
        axes.plot([step * scale for step, _ in run.losses], [loss for _, loss in run.losses], style, color=colour)
    lowest, highest = axes.get_ylim()
    place = -math.inf
    for loss, run, scale in ends:
        place = max(loss, place + 0.045 * (highest - lowest))  # names do not lie upon each other
        colour = f"C{list(CONTESTANTS).index(run.contestant)}"
        axes.annotate(f" {CONTESTANTS[run.contestant]}, {loss:.3f}", (run.steps * scale, place), color=colour,
                      fontsize=8, va="center", annotation_clip=False)  # fmt: skip
    axes.set_xlabel(what)
    axes.set_xlim(0, 1.42 * max(run.steps * scale for run, scale in curves))
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str]) -> int:
    """Prints what is to be run, or draws."""
    folder = Path(arguments[0])
    if "--draw" in arguments:
        write_all(folder)
        return 0
    for line in following(read_runs(folder), step_seconds(folder)):
        print(*line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
