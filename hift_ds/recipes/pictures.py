"""Pictures of a comparison: peak memory measured beside forecast, and step time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hift_ds.memory.figures import COLOURS, MEASURED_ROLES

_DPI, _WIDTH, _ROW_HEIGHT, _LEAST_HEIGHT = 150, 9.0, 0.34, 2.6

Results = Sequence[tuple[Any, dict[str, Any]]]


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draws what there is to draw of cells and their results; the paths."""
    done = [(cell, result) for cell, result in results if result["status"] == "ok"]
    timed = [(cell, result) for cell, result in done if result["step_ms"] is not None]
    drawn = [_memory(results, folder / "memory.png")] if done else []
    return drawn + ([_time(timed, folder / "time.png")] if timed else [])


def labels_of(cells: Sequence[Any]) -> list[str]:
    """Short names: only what differs among the cells."""
    parts = []
    for cell in cells:
        parts.append({
            "method": {"hift": "HiFT", "offload": "full, offloaded"}.get(cell.method, "full"),
            "stage": f"ZeRO-{cell.stage}" if cell.stage else "no ZeRO",
            "precision": cell.precision, "gpus": f"{cell.gpus} ranks", "optimizer": cell.optimizer,
            "checkpointing": "ckpt" if cell.checkpointing else "", "seq_len": f"{cell.seq_len} tokens",
            "layers_per_block": "" if cell.layers_per_block is None else f"m={cell.layers_per_block}",
            "order": cell.order or "", "update": f"update in {cell.update}" if cell.update else "",
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
        for role in MEASURED_ROLES:
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


def _time(timed: Results, path: Path) -> Path:
    figure, axes = _rows(len(timed))
    for place, (cell, result) in enumerate(timed):
        low, middle, high = (result["step_ms"][share] for share in ("p20", "p50", "p80"))
        colour = COLOURS["weights"] if cell.method == "hift" else COLOURS["other"]
        axes.barh(place, middle, 0.62, color=colour)
        axes.plot([low, high], [place, place], color="black", linewidth=1)
        count, steps = result["timed_cycles"], result["cycles"]["steps"]
        axes.text(high, place, f"  {middle:,.0f} ms, {count} cycles of {steps} steps", va="center", fontsize=7)
    title = "ms of a step, mean over a cycle: median of the cycles, and a line from their p20 to p80"
    _finish(figure, axes, labels_of([cell for cell, _ in timed]), title, path, False)
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
    axes.set_xlim(0, (1.02 if legend else 1.25) * axes.dataLim.x1)  # beside bars without a legend stands text
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path)
