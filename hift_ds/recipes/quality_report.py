"""Table and picture of a comparison of quality, from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from hift_ds.memory.figures import COLOURS, mib
from hift_ds.recipes.quality import UNTRAINED, Result
from hift_ds.recipes.quality_plan import METHODS, TASKS

_BUDGETS = {"steps": "at equal steps", "seconds": "at equal seconds"}
_HEADERS = (
    "method", "trained", "rate", "steps", "{metric}", "lowest to highest", "seeds", "speed", "CPU s of a run",
    "peak MiB", "of it gradients", "of it state", "loss on other text",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """The test runs of one method at one budget, over the seeds."""

    task: str
    method: str
    budget: str
    runs: tuple[Result, ...]

    @property
    def metric(self) -> str:
        """What counts in the task."""
        return TASKS[self.task].counts

    @property
    def values(self) -> list[float]:
        """Of the metric, by seed: accuracies in percent, or losses; infinite where a run diverged."""
        found = [run["metrics"][self.metric] for run in self.runs]
        return [float("inf") if value is None else value * (100 if self.metric == "accuracy" else 1) for value in found]


def groups_of(rows: Iterable[Result]) -> list[Group]:
    """Test runs by task, budget and method, in the order of those."""
    found: dict[tuple[str, str, str], list[Result]] = {}
    for row in rows:
        settings = row["settings"]
        if settings["kind"] == "run" and settings["part"] == "test":
            found.setdefault((settings["task"], settings["method"]["name"], settings["budget"]), []).append(row)
    orders = [list(TASKS), [UNTRAINED, *METHODS], list(_BUDGETS)]
    keys = sorted(found, key=lambda key: (orders[0].index(key[0]), orders[2].index(key[2]), orders[1].index(key[1])))
    return [Group(*key, tuple(found[key])) for key in keys]


def write_report(rows: Sequence[Result], folder: Path) -> list[Path]:
    """Writes results.md and quality.png of the rows that are there; the paths.

    Raises:
        ValueError: No run has met the test rows yet.
    """
    groups = groups_of(rows)
    if not groups:
        raise ValueError(f"--output_dir {str(folder)!r}: rows.jsonl has no test run yet; run without --report first")
    table = folder / "results.md"
    table.write_text(markdown(rows, groups), encoding="utf-8")
    return [table, draw(groups, folder / "quality.png")]


def markdown(rows: Sequence[Result], groups: Sequence[Group]) -> str:
    """A table for each task and budget, with what was the same for all above it."""
    parts = ["# How well it learns: the rows as tables\n"]
    for task, budget in dict.fromkeys((group.task, group.budget) for group in groups):
        mine = [group for group in groups if (group.task, group.budget) == (task, budget)]
        parts.append(f"## {task}, {_BUDGETS[budget]}\n\n{_shared(mine)}\n")
        parts.append(_table([_cells(group, rows) for group in mine], mine[0].metric))
    return "\n".join(parts)


def _shared(groups: Sequence[Group]) -> str:
    run = groups[-1].runs[0]
    settings, versions = run["settings"], ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    dates = sorted({run["date"] for group in groups for run in group.runs})
    loads = [load for group in groups for run in group.runs for load in run["load_average"]]
    return (
        f"Model {settings['model']}, {settings['micro_batch']} rows a step of {settings['max_tokens']} tokens at most, "
        f"rates chosen on {settings['num_validation']} validation rows, tested on {run['metrics']['count']} "
        f"{'tokens' if groups[0].metric == 'loss' else 'rows'}. {run['device']}, {run['threads']} thread(s), load "
        f"average {min(loads):.1f} to {max(loads):.1f}; {versions}; {dates[0]} to {dates[-1]}."
    )


def _table(lines: Sequence[Sequence[str]], metric: str) -> str:
    headers = [header.format(metric="accuracy, %" if metric == "accuracy" else "test loss") for header in _HEADERS]
    shown = [place for place in range(len(headers)) if any(line[place] for line in lines)]
    all_lines = [headers, ["---"] * len(headers), *lines]
    return "".join("| " + " | ".join(line[place] or "n/a" for place in shown) + " |\n" for line in all_lines)


def _cells(group: Group, rows: Sequence[Result]) -> list[str]:
    first, values = group.runs[0], group.values
    settings, digits = first["settings"], 1 if group.metric == "accuracy" else 4
    unrelated = [run["unrelated_loss"] for run in group.runs if run["unrelated_loss"] is not None]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    steps = settings["steps"]
    costs = next((row for row in rows if row["settings"]["kind"] == "costs" and _same(row, first)), None)
    return [
        label_of(group.method), f"{first['trained_parameters']:,}" if steps else "", _rate(first, rows),
        str(steps), f"{fmean(values):.{digits}f}{spread}", f"{min(values):.{digits}f} to {max(values):.{digits}f}",
        str(len(values)),
        f"{costs['speed']:.2f}" if costs else "",
        f"{median(run['cpu_seconds'] for run in group.runs):,.0f}" if steps else "",
        *((mib(costs["peak"][role]) for role in ("allocated", "gradients", "state")) if costs else ("", "", "")),
        f"{fmean(unrelated):.4f}" if unrelated else "",
    ]  # fmt: skip


def _rate(run: Result, rows: Sequence[Result]) -> str:
    """The chosen rate; marked where it was the least or the greatest of those that were tried."""
    settings = run["settings"]
    if settings["method"]["name"] == UNTRAINED:
        return ""
    tried = [
        row["settings"]["rate"]
        for row in rows
        if row["settings"]["kind"] == "run" and row["settings"]["part"] == "validation" and _same(row, run)
    ]
    edge = tried and settings["rate"] in (min(tried), max(tried))
    return f"{settings['rate']:g}{' (edge of the grid)' if edge else ''}"


def _same(row: Result, other: Result) -> bool:
    """Whether two rows are of one task and method."""
    return all(row["settings"][key] == other["settings"][key] for key in ("task", "method"))


def label_of(name: str) -> str:
    """A method's name as tables and pictures say it."""
    return "before training" if name == UNTRAINED else METHODS[name].label


def draw(groups: Sequence[Group], path: Path) -> Path:
    """A panel for each task: the methods' means with their lowest and highest, at both budgets; the path."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(group.task for group in groups))
    most = max(len({group.method for group in groups if group.task == task}) for task in tasks)
    size = (1.6 + 4.6 * len(tasks), 1.6 + 0.52 * most)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        _panel(axes, task, [group for group in groups if group.task == task])
    figure.savefig(path)
    return path


def _seeds(groups: Sequence[Group]) -> str:
    numbers = sorted({len(group.runs) for group in groups})
    return f"{' to '.join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))} seed(s)"


def _panel(axes: Any, task: str, groups: Sequence[Group]) -> None:
    names = [name for name in (UNTRAINED, *METHODS) if name in {group.method for group in groups}]
    colours = {"steps": COLOURS["weights"], "seconds": COLOURS["gradients"]}
    for group in groups:
        finite = [value for value in group.values if value != float("inf")]
        place = names.index(group.method) + {"steps": -0.16, "seconds": 0.16}[group.budget]
        if not finite:
            axes.text(0.02, place, "diverged", transform=axes.get_yaxis_transform(), va="center", fontsize=7)
            continue
        mean = fmean(finite)
        axes.plot([min(finite), max(finite)], [place, place], color=colours[group.budget], linewidth=1.4)
        axes.plot(mean, place, "o", color=colours[group.budget], markersize=5)
        shown = f"{mean:.1f}" if group.metric == "accuracy" else f"{mean:.3f}"
        axes.annotate(
            shown, (max(finite), place), (6, 0), textcoords="offset points", va="center", fontsize=7,
            color=colours[group.budget],
        )  # fmt: skip
    axes.set_yticks(range(len(names)), [label_of(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -1.1)
    axes.margins(x=0.14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e0e0e0", linewidth=0.6)
    axes.set_axisbelow(True)
    metric = "accuracy on test rows, %" if groups[0].metric == "accuracy" else "loss on test rows (lower is better)"
    axes.set_xlabel(f"{metric}: mean of the seeds, and a line from lowest to highest", fontsize=8)
    axes.set_title(f"{task}, {_seeds(groups)}", fontsize=10, loc="left")
    budgets = [budget for budget in _BUDGETS if any(group.budget == budget for group in groups)]
    for number, budget in enumerate(budgets):
        axes.text(0.02 + 0.3 * number, 1 - 0.012, _BUDGETS[budget], color=colours[budget], fontsize=8,
                  transform=axes.transAxes, va="top")  # fmt: skip
