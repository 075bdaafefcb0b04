"""A forecast as a table, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from hift_ds.extras import needs_recipes
from hift_ds.memory.advice import Advice
from hift_ds.memory.figures import COLOURS, ROLES, Figures, Forecast, gib
from hift_ds.memory.request import RESERVE_BYTES
from hift_ds.memory.timing import Timing

CARDS = (12, 16, 24, 32, 40, 48, 80, 141)  # GiB of cards that one can rent or buy
_HEIGHT, _WIDTH, _DPI = 5.0, 10.0, 150


def render(
    forecast: Forecast, advice: Advice | None, seconds: Timing | None = None, room: tuple[int, int] | None = None
) -> RenderableType:
    """For the terminal.

    Args:
        room: Of `room_for_activations`.
    """
    tables = (_title(forecast), _blocks_table(forecast), _with_traffic(forecast))
    parts: list[RenderableType] = [*(part for table in tables for part in (table, "")), verdict(forecast)]
    if forecast.uncounted:
        parts += ["", _images_line(forecast)]
    if seconds is not None:
        parts += ["", _seconds_line(seconds)]
    if room is not None:
        need = gib(room[1] + RESERVE_BYTES)
        parts += ["", f"memory is left: with --keep_layers {room[0]} a step recomputes less, and needs {need} GiB"]
    if advice is not None:
        parts += ["", *_advice_lines(forecast, advice)]
    return Group(*parts)


def to_json(
    forecast: Forecast, advice: Advice | None, paper: dict[str, Any], seconds: Timing | None = None,
    room: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    request = forecast.request
    found: dict[str, Any] = {
        "model": forecast.model,
        "parameters": forecast.full.numel,
        "request": {
            **{key: value for key, value in asdict(request).items() if key not in ("ds_config", "optimizer")},
            "stage": request.config.stage, "precision": request.config.precision,
            "micro_batch": request.config.micro_batch,
        },
        "config": dict(request.ds_config),
        "blocks": [block.to_json() for block in forecast.blocks],
        "blocks_that_text_does_not_reach": list(forecast.uncounted),
        "worst_block": forecast.worst.name,
        "peak": forecast.worst.peak,
        "reserve": RESERVE_BYTES,
        "host_per_rank": forecast.host,
        "host_per_node": forecast.host * request.gpus,
        "full_fine_tuning": {**forecast.full.to_json(), "host_per_rank": forecast.full_host},
        "fits": forecast.fits,
        "as_the_paper_counts": paper,
    }  # fmt: skip
    if seconds is not None:
        found["modelled_step"] = {
            **asdict(seconds), "exposed": seconds.exposed, "tokens_per_second": seconds.tokens_per_second
        }
    if room is not None:
        found["room_for_activations"] = dict(zip(("keep_layers", "peak"), room, strict=True))
    if advice is not None:
        found["cheapest_change"] = [{"what": change.what, "cost": change.cost} for change in advice.changes]
        found["peak_after_change"] = None if advice.forecast is None else advice.forecast.worst.peak
    return found


def _seconds_line(seconds: Timing) -> str:
    return (
        f"a step on one card, modelled and not measured: {seconds.step:.2f} s, of these {seconds.compute:.2f} s of "
        f"compute; copies of state {seconds.copies:.2f} s each way, {seconds.exposed:.2f} s of them not hidden; "
        f"{seconds.tokens_per_second:,.0f} tokens/s"
    )


def _images_line(forecast: Forecast) -> str:
    first, last = forecast.uncounted[0], forecast.uncounted[-1]
    which = f"{first} to {last}, " if len(forecast.uncounted) > 1 else f"{first}, "
    return (
        f"Planned on text alone: the activations of images (or sound) are not counted. {which}"
        f"{len(forecast.uncounted)} of {len(forecast.blocks)} blocks, train on them alone; for batches without any set "
        '"no_gradient": "skip" in the "hift" section.'
    )


def verdict(forecast: Forecast) -> str:
    """Fits or not, in a sentence."""
    need = forecast.worst.peak + RESERVE_BYTES
    limit, host_limit = forecast.request.gpu_memory, forecast.request.host_memory
    reserve = f"{gib(RESERVE_BYTES)} GiB of it is an allowance for CUDA itself and gaps"
    if limit is None:
        card = next((size for size in CARDS if need <= size << 30), None)
        smallest = "no single common card holds it" if card is None else f"a card of {card} GiB holds it"
        sentence = f"needs {gib(need)} GiB a card ({reserve}): {smallest}"
    else:
        word = "[green]fits[/]" if forecast.fits_device else "[red]does not fit[/]"
        sentence = f"{word}: needs {gib(need)} GiB of {gib(limit)} GiB ({reserve})"
    if host_limit is not None:
        word = "fits" if forecast.fits_host else "[red]does not fit[/]"
        sentence += f"; host {word}: {gib(forecast.host * forecast.request.gpus)} GiB of {gib(host_limit)} GiB a node"
    return sentence


@needs_recipes()
def plot(forecast: Forecast, path: Path) -> None:
    """Stacked bars, one a block, with full fine-tuning beside and the card as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
    axes, beside = figure.subplots(1, 2, width_ratios=(12, 1))
    _bars(axes, forecast.blocks)
    _bars(beside, [forecast.full])
    axes.set_xticks(range(len(forecast.blocks)), [str(index) for index in range(len(forecast.blocks))], fontsize=7)
    if len(forecast.blocks) > 40:
        axes.set_xticks(range(0, len(forecast.blocks), 5))
    axes.set_xlabel("active block, from the bottom of the model")
    axes.set_ylabel("GiB of device memory at the peak")
    beside.set_xticks([0], ["full"])
    highest = forecast.worst.peak
    limit = forecast.request.gpu_memory
    for side, top in ((axes, highest), (beside, forecast.full.peak)):
        if limit is not None:
            side.axhline(limit / 2**30, color="black", linestyle="--", linewidth=1, label="the card")
        side.set_ylim(0, 1.08 * max(top, limit or 0) / 2**30)
        side.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False, fontsize=8)
    request = forecast.request
    figure.suptitle(f"{_heading(forecast)}: {request.config.micro_batch} x {request.seq} tokens a rank", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _bars(axes: Any, blocks: Sequence[Figures]) -> None:
    bottoms = [0.0] * len(blocks)
    for role in ROLES:
        heights = [getattr(block, role) / 2**30 for block in blocks]
        axes.bar(range(len(blocks)), heights, 0.8, bottoms, label=role, color=COLOURS[role])
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]


def _heading(forecast: Forecast) -> str:
    request, numel = forecast.request, forecast.full.numel
    ranks = f"{request.gpus} GPU{'s' * (request.gpus > 1)}"
    if request.nodes > 1:
        ranks = f"{request.nodes} nodes of {ranks}"
    size = f"{numel / 1e9:.2f} B parameters" if numel >= 1e8 else f"{numel:,} parameters"
    checkpointing = ", activation checkpointing" if request.checkpointing else ""
    checkpointing += " of layers that train" if checkpointing and not request.checkpoint_frozen else ""
    checkpointing += f" but in the last {request.keep_layers} layers" if request.keep_layers else ""
    loss = "" if request.loss_tile is None else f", loss in chunks of {request.loss_tile / 2**20:.3g} MiB"
    compiled = ", compiled layers" if request.compiled else ""
    stage = f"ZeRO-{request.config.stage}"
    return f"{forecast.model}, {size}, {request.config.precision}, {stage}, {ranks}{checkpointing}{loss}{compiled}"


def _title(forecast: Forecast) -> str:
    request = forecast.request
    steps = request.config.micro_steps
    return (
        f"{_heading(forecast)}\n{request.config.micro_batch} x {request.seq} tokens a rank and micro step, {steps} "
        f"micro step{'s' * (steps > 1)}; {len(forecast.blocks)} blocks, {request.ds_config['optimizer']['type']}"
    )


def _blocks_table(forecast: Forecast) -> Table:
    table = Table(
        title="Device memory when each block trains, at its peak, GiB per rank", box=SIMPLE_HEAD, show_edge=False,
        pad_edge=False, padding=(0, 1, 0, 0),
        caption="traced from the model, not measured; of alike blocks the highest",
    )  # fmt: skip
    table.add_column("block", overflow="ellipsis", no_wrap=True, max_width=18)
    for header in (*ROLES, "peak"):
        table.add_column(header, justify="right", no_wrap=True, min_width=len(header))
    table.add_column("phase", no_wrap=True)
    worst = forecast.blocks.index(forecast.worst)
    for first, last in _alike(forecast.blocks):
        highest = max(forecast.blocks[first : last + 1], key=lambda block: block.peak)
        name = _short(forecast.blocks[first].name)
        if first != last:
            name += f" to {forecast.blocks[last].name.rpartition('.')[2]}"
        if first == worst:
            name = f"> {name}"
        cells = [gib(getattr(highest, role)) for role in (*ROLES, "peak")]
        table.add_row(name, *cells, highest.phase, style="bold" if first == worst else None)
    return table


def _short(name: str) -> str:
    """`model.layers.0` as `layers.0`, for a narrow column; JSON has it whole."""
    ends = [end.split(".") for end in name.split("..")]
    return "..".join(".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:]) for parts in ends)


def _alike(blocks: Sequence[Figures]) -> list[tuple[int, int]]:
    """Runs of blocks of the same size and phase; the worst one stands alone."""
    worst = max(range(len(blocks)), key=lambda index: blocks[index].peak)
    runs: list[tuple[int, int]] = []
    for index, block in enumerate(blocks):
        if runs:
            first, last = runs[-1]
            same = (blocks[first].numel, blocks[first].phase) == (block.numel, block.phase)
            if same and worst not in (index, last):
                runs[-1] = (first, index)
                continue
        runs.append((index, index))
    return runs


def compared_table(forecast: Forecast, title: str, number: Callable[[float], str]) -> Table:
    """Bytes of a rank by role: HiFT at the peak of its worst block, beside full fine-tuning.

    Args:
        number: How bytes are shown.
    """
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    table.add_column("HiFT", justify="right")
    table.add_column("full fine-tuning", justify="right")
    worst, full = forecast.worst, forecast.full
    for role in ROLES:
        table.add_row(role, number(getattr(worst, role)), number(getattr(full, role)))
    table.add_section()
    table.add_row("device, at the peak", f"{number(worst.peak)} ({forecast.saved})", number(full.peak))
    table.add_row("host, pinned", number(forecast.host), number(forecast.full_host))
    return table


def _with_traffic(forecast: Forecast) -> Table:
    table = compared_table(forecast, "The worst block beside full fine-tuning, GiB per rank", gib)
    gpus = forecast.request.gpus
    if gpus > 1:
        table.add_row("host, of a node", gib(forecast.host * gpus), gib(forecast.full_host * gpus))
    table.add_section()
    for label, key in (("bus to the device", "to_device"), ("bus to the host", "to_host"), ("collectives", "network")):
        mean = fmean(getattr(block, key) for block in forecast.blocks)
        table.add_row(f"{label}, a step", gib(mean), gib(getattr(forecast.full, key)))
    return table


def _advice_lines(forecast: Forecast, advice: Advice) -> list[str]:
    if advice.forecast is None:
        return ["No change that is known here makes it fit: take a larger card or more of them."]
    lines = ["The cheapest change that makes it fit:" if len(advice.changes) == 1 else "The cheapest changes that fit:"]
    lines += [f"  - {change.what} (costs: {change.cost})" for change in advice.changes]
    lines.append(f"then: {verdict(advice.forecast)}")
    return lines
