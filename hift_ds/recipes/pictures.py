"""Pictures of a comparison: peak memory measured beside forecast, step time, loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROLES = ("weights", "gradients", "state", "activations", "other")
COLOURS = {
    "weights": "#4c72b0", "gradients": "#dd8452", "state": "#55a868", "activations": "#8172b3", "other": "#937860",
}  # fmt: skip
_DPI, _WIDTH, _ROW_HEIGHT, _LEAST_HEIGHT = 150, 9.0, 0.34, 2.6
_SMOOTHED = 10  # steps in a mean of the loss

Results = Sequence[tuple[Any, dict[str, Any]]]


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draws what there is to draw of cells and their results; the paths."""
    done = [(cell, result) for cell, result in results if result["status"] == "ok"]
    drawn = []
    if done:
        drawn += [_memory(results, folder / "memory.png"), _time(done, folder / "time.png")]
        drawn.append(_losses(done, folder / "loss.png"))
    return [path for path in drawn if path is not None]


def labels_of(cells: Sequence[Any]) -> list[str]:
    """Short names: only what differs among the cells."""
    parts = []
    for cell in cells:
        parts.append({
            "method": "HiFT" if cell.method == "hift" else "full",
            "stage": f"ZeRO-{cell.stage}" if cell.stage else "no ZeRO",
            "precision": cell.precision, "gpus": f"{cell.gpus} ranks", "optimizer": cell.optimizer,
            "checkpointing": "ckpt" if cell.checkpointing else "", "seq_len": f"{cell.seq_len} tokens",
            "layers_per_block": "" if cell.layers_per_block is None else f"m={cell.layers_per_block}",
            "order": cell.order or "",
            "steps_per_block": "" if cell.steps_per_block is None else f"K={cell.steps_per_block}",
        })  # fmt: skip
    telling = [key for key in parts[0] if key == "method" or len({part[key] for part in parts} - {""}) > 1]
    return [", ".join(part[key] for key in telling if part[key]) for part in parts]


def _memory(results: Results, path: Path) -> Path:
    figure, axes = _rows(len(results))
    labels = labels_of([cell for cell, _ in results])
    highest = max(r["measured"]["allocated"] for _, r in results if r["status"] == "ok") / 2**20
    for place, (_, result) in enumerate(results):
        if result["status"] != "ok":
            axes.text(0.01 * highest, place, result["status"][:60], va="center", fontsize=7, color="#a00000")
            continue
        left = 0.0
        for role in ROLES:
            width = result["measured"][role] / 2**20
            label = "activations, buckets" if role == "activations" else role
            axes.barh(place, width, 0.62, left, color=COLOURS[role], label=label)
            left += width
        if isinstance(result["forecast"], dict):
            peak = result["forecast"]["peak"] / 2**20
            axes.plot([peak, peak], [place - 0.42, place + 0.42], color="black", linewidth=1.6, label="forecast")
    how = next(r["measured"]["how"] for _, r in results if r["status"] == "ok")
    _finish(figure, axes, labels, f"peak of the worst rank, MiB ({how})", path)
    return path


def _time(done: Results, path: Path) -> Path | None:
    timed = [(cell, result) for cell, result in done if result["step_ms"] is not None]
    if not timed:
        return None
    figure, axes = _rows(len(timed))
    for place, (cell, result) in enumerate(timed):
        low, middle, high = (result["step_ms"][share] for share in ("p20", "p50", "p80"))
        colour = COLOURS["weights"] if cell.method == "hift" else COLOURS["other"]
        axes.barh(place, middle, 0.62, color=colour)
        axes.plot([low, high], [place, place], color="black", linewidth=1)
    title = "step, ms, mean of a cycle (median cycle; line: 20 to 80 %)"
    _finish(figure, axes, labels_of([cell for cell, _ in timed]), title, path, False)
    return path


def _losses(done: Results, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 4.6), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    for label, (cell, result) in zip(labels_of([cell for cell, _ in done]), done, strict=True):
        losses = result["loss"]
        window = min(_SMOOTHED, max(1, len(losses) // 4))
        means = [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]
        style = "--" if cell.method == "full" else "-"
        axes.plot(range(window, len(losses) + 1), means, style, linewidth=1.2, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (running mean)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path)
    return path


def _rows(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    height = max(_LEAST_HEIGHT, 1.3 + _ROW_HEIGHT * count)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Any, axes: Any, labels: list[str], title: str, path: Path, legend: bool = True) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel(title, fontsize=9)
    axes.set_xlim(0, 1.02 * axes.dataLim.x1)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path)
