"""The matrix of a comparison: cells, their commands and their rows. Nothing here imports torch."""

from __future__ import annotations

import copy
import csv
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

COLUMNS = (
    "status", "method", "stage", "ranks", "nodes", "dtype", "optimizer", "update", "layers_per_block", "order",
    "steps_per_block", "blocks", "activation_checkpointing", "micro_batch", "accumulation", "sequence", "peak_mib",
    "active_mib", "reserved_mib", "forecast_mib", "weights_mib", "gradients_mib", "state_mib", "activations_mib",
    "other_mib", "step_ms_p20", "step_ms_p50", "step_ms_p80", "rounds", "timed_cycles", "timed_steps", "tokens_per_s",
    "first_loss", "last_loss", "held_out_loss", "steps", "model", "parameters", "gpu_memory_limit", "how_measured",
    "device", "driver", "python", "torch", "deepspeed", "transformers", "commit", "date",
)  # fmt: skip
SHOWN = {
    "method": "method", "stage": "ZeRO", "dtype": "dtype", "ranks": "ranks", "optimizer": "optimizer",
    "update": "update", "blocks": "blocks", "order": "order", "steps_per_block": "K",
    "activation_checkpointing": "ckpt", "sequence": "tokens a row", "peak_mib": "peak MiB",
    "active_mib": "active MiB", "reserved_mib": "reserved MiB",
    "forecast_mib": "forecast MiB", "step_ms_p50": "step ms", "step_ms_p20": "p20",
    "step_ms_p80": "p80", "timed_steps": "steps timed", "tokens_per_s": "tokens/s", "last_loss": "last loss",
    "held_out_loss": "held-out loss", "status": "status",
}  # fmt: skip


_OF_BLOCKS = ("layers_per_block", "order", "steps_per_block", "update")  # a cell's and the "hift" section's


@dataclass(frozen=True)
class Cell:
    """One run of the matrix. Full fine-tuning, offloaded or not, has no blocks: its last four fields are `None`."""

    method: str
    stage: int
    precision: str
    gpus: int
    optimizer: str
    checkpointing: bool
    seq_len: int
    layers_per_block: int | None = None
    order: str | None = None
    steps_per_block: int | None = None
    update: str | None = None

    @property
    def name(self) -> str:
        """Unique in a matrix, and a file's name."""
        parts = [self.method, f"zero{self.stage}", self.precision, f"{self.gpus}gpus", self.optimizer.lower()]
        parts += [f"{self.seq_len}tokens"] + ["ckpt"] * self.checkpointing
        if self.method == "hift":
            parts += [f"m{self.layers_per_block}", str(self.order), f"k{self.steps_per_block}"]
            parts += [str(self.update)] * (self.update != "step")
        return "_".join(parts)


@dataclass(frozen=True)
class Matrix:
    """The values of each dimension; every combination is a cell."""

    methods: Sequence[str] = ("full", "hift")
    stages: Sequence[int] = (0, 1, 2, 3)
    precisions: Sequence[str] = ("fp32", "bf16", "fp16")
    gpus: Sequence[int] = (1,)
    optimizers: Sequence[str] = ("AdamW",)
    gradient_checkpointing: Sequence[bool] = (False,)
    seq_lens: Sequence[int] = (512,)
    layers_per_block: Sequence[int] = (1,)
    orders: Sequence[str] = ("bottom2up",)
    steps_per_block: Sequence[int] = (1,)
    updates: Sequence[str] = ("step",)

    def cells(self) -> list[Cell]:
        """In an order in which what is compared runs one after the other."""
        return list(dict.fromkeys(self._cells()))

    def _cells(self) -> Iterator[Cell]:
        for precision, gpus, stage, optimizer, checkpointing, seq_len, method in itertools.product(
            self.precisions, self.gpus, self.stages, self.optimizers, self.gradient_checkpointing, self.seq_lens,
            self.methods,
        ):
            common = (method, stage, precision, gpus, optimizer, checkpointing, seq_len)
            if method == "hift":
                dimensions = (self.layers_per_block, self.orders, self.steps_per_block, self.updates)
                yield from (Cell(*common, *blocks) for blocks in itertools.product(*dimensions))
            elif method == "full" or stage:  # DeepSpeed offloads nothing without ZeRO
                yield Cell(*common)


def in_rounds(cells: Sequence[Cell], rounds: int) -> list[tuple[Cell, int]]:
    """Cells and the round of each. Those that differ in method or blocks alone take turns, a run of each per round.

    So that a slow drift of the machine's speed falls on all of them.
    """
    alike = itertools.groupby(
        cells,
        lambda cell: replace(cell, method="", layers_per_block=None, order=None, steps_per_block=None, update=None),
    )
    groups = [list(group) for _, group in alike]
    return [(cell, number) for group in groups for number in range(1, rounds + 1) for cell in group]


def config_of(cell: Cell, base: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed config of a cell: the base with its stage, precision and optimizer."""
    from hift_ds.config.resolve import set_precision, set_stage

    config = copy.deepcopy(base)
    set_precision(config, cell.precision)
    if cell.precision == "fp16":
        # From DeepSpeed's 2**16 a small model's first steps, those that are measured, overflow and update nothing.
        config["fp16"]["initial_scale_power"] = 10
    set_stage(config, cell.stage)
    config["optimizer"] = _optimizer(config.get("optimizer") or {}, cell.optimizer, cell.method)
    if cell.method == "offload":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    section = dict(config.get("hift") or {})
    for key in _OF_BLOCKS:
        if getattr(cell, key) is not None:
            section[key] = getattr(cell, key)
    config["hift"] = {**section, "enabled": True}  # without --hift the scripts leave it out
    return config


def _optimizer(section: dict[str, Any], name: str, method: str) -> dict[str, Any]:
    kind = "SGD" if name == "SGDM" else name
    params = dict(section.get("params") or {})
    if section.get("type", "AdamW").lower() != kind.lower():  # the others' betas and switches are not this one's
        params = {key: value for key, value in params.items() if key in ("lr", "weight_decay")}
    if name == "SGDM":
        params["momentum"] = 0.9
    if method == "offload":  # DeepSpeed takes its own on the host
        params = {key: value for key, value in params.items() if key not in ("torch_adam", "fused")}
    elif kind.lower() in ("adam", "adamw"):
        # DeepSpeed's own would be compiled first. Unfused, torch's would make full fine-tuning look worse than it is:
        # it makes temporary tensors as large as all masters.
        params |= {"torch_adam": True, "fused": True}
    return {"type": kind, "params": params}


def signature(cell: Cell, config: dict[str, Any], options: Sequence[str]) -> str:
    """Changes with anything that a cell's result depends on, so that a result of other settings is not taken for it.

    Also with the columns: a result of a version with others is not complete.
    """
    content = json.dumps([asdict(cell), config, list(options), COLUMNS], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def flat_row(cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    """One line of the table, by `COLUMNS`; what a failed cell has not measured is empty."""
    row = {column: result.get(column) for column in COLUMNS}
    row.update({
        "method": cell.method, "stage": cell.stage, "dtype": cell.precision, "ranks": result.get("ranks", cell.gpus),
        "optimizer": cell.optimizer, "sequence": cell.seq_len, "activation_checkpointing": cell.checkpointing,
        **{key: getattr(cell, key) for key in _OF_BLOCKS},
    })  # fmt: skip
    row.update(result.get("versions") or {})
    measured = result.get("measured")
    if measured:
        row["peak_mib"] = _mib(measured["allocated"])
        row |= {f"{name}_mib": _mib(measured.get(name)) for name in
                ("active", "reserved", "weights", "gradients", "state", "activations", "other")}  # fmt: skip
        row["how_measured"] = measured["how"]
    if isinstance(result.get("forecast"), dict):
        row["forecast_mib"] = _mib(result["forecast"]["peak"])
    row |= {f"step_ms_{share}": value for share, value in (result.get("step_ms") or {}).items()}
    losses = result.get("loss")
    if losses:
        row |= {"first_loss": round(losses[0], 4), "last_loss": round(sum(losses[-5:]) / len(losses[-5:]), 4)}
    held_out = [loss for loss in result.get("held_out_loss") or [] if loss is not None]
    row["held_out_loss"] = round(held_out[-1], 4) if held_out else None
    if isinstance(row["tokens_per_s"], float):
        row["tokens_per_s"] = round(row["tokens_per_s"], 1)
    return row


def write_tables(rows: Sequence[dict[str, Any]], folder: Path, title: str) -> None:
    """results.csv with every column, results.md with those that differ or matter."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "results.md").write_text(markdown(rows, title), encoding="utf-8")


def markdown(rows: Sequence[dict[str, Any]], title: str) -> str:
    """The table for readers, and beneath it what all rows share."""
    columns = [column for column in SHOWN if _tells(column, [row[column] for row in rows])]
    lines = [f"# {title}", "", "| " + " | ".join(SHOWN[column] for column in columns) + " |"]
    lines.append("|" + "|".join("---" for _ in columns) + "|")
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    shared = [
        f"{column.replace('_', ' ')} {values.pop()}"
        for column in (*SHOWN, "model", "parameters", "rounds", "how_measured", "device", "torch", "deepspeed",
                       "transformers", "commit", "date")
        for values in [{_cell(row[column]) for row in rows if row[column] is not None}]
        if column not in columns and len(values) == 1
    ]  # fmt: skip
    return "\n".join([*lines, "", "All: " + "; ".join(shared) + "."]) + "\n"


def _tells(column: str, values: list[Any]) -> bool:
    if column in ("method", "peak_mib", "step_ms_p50", "status"):
        return True
    present = {str(value) for value in values if value is not None}
    return len(present) > 1


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return str(value).replace("|", "\\|")


def _mib(count: int | None) -> float | None:
    return None if count is None else round(count / 2**20, 1)
