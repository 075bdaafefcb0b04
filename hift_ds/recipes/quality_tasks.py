"""Models and rows of the comparison of quality: to train on, to choose rates by and to test on."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hift_ds.recipes.datasets import IGNORED, TokenRows, load_text_dataset
from hift_ds.recipes.quality_plan import Task

SPLIT_SEED = 0  # of validation and test rows: the same for every run

TokenRow = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TaskData:
    """Tokenised rows, each a dict of `input_ids`, `attention_mask` [tokens] and `labels` ([tokens], or a class)."""

    name: str
    train: Sequence[TokenRow]
    validation: Sequence[TokenRow]
    test: Sequence[TokenRow]
    collate: Callable[[Sequence[TokenRow]], TokenRow]
    num_labels: int | None = None
    unrelated: Sequence[TokenRow] = field(default_factory=tuple)


@dataclass(frozen=True)
class Groups:
    """Training rows as `training.batches` takes them: each item is a micro batch."""

    name: str
    train: Sequence[Sequence[TokenRow]]
    data: TaskData

    def collate(self, groups: Sequence[Sequence[TokenRow]]) -> TokenRow:
        """The padded micro batch of one group."""
        return self.data.collate(groups[0])


def in_groups(data: TaskData, size: int, seed: int, pool: int = 8) -> Groups:
    """Draws micro batches of `size` rows of like length: from pools of `pool` batches, so that little is padding."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = []
    for start in range(0, len(order) - size + 1, size * pool):
        drawn = sorted((data.train[i] for i in order[start : start + size * pool]), key=_length)
        groups += [drawn[i : i + size] for i in range(0, len(drawn) - size + 1, size)]
    return Groups(data.name, groups, data)


def _length(row: TokenRow) -> int:
    return len(row["input_ids"])


def load_task(task: Task, folder: Path) -> TaskData:
    """Reads and tokenises a task's rows.

    Raises:
        FileNotFoundError: The folder lacks a file.
        ValueError: A row that is not of the form.
    """
    missing = [name for name in task.files if name and not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"--data {str(folder)!r}: {task.name} needs {', '.join(missing)} there; name the folder that has them, or "
            "other --tasks"
        )
    from hift_ds.recipes.models import load_tokenizer

    tokenizer = load_tokenizer(task.model)
    return _language(task, folder, tokenizer) if task.counts == "loss" else _labelled(task, folder, tokenizer)


def _labelled(task: Task, folder: Path, tokenizer: Any) -> TaskData:
    parts = [_read_labelled(folder / name) for name in task.files[:2]]
    labels = {label: number for number, label in enumerate(sorted({label for _, label in parts[0]}))}

    def tokenised(rows: Sequence[tuple[str, str]]) -> list[TokenRow]:
        encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=task.max_tokens)["input_ids"]
        return [
            {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), dtype=torch.long),
             "labels": torch.tensor(labels[label])}
            for ids, (_, label) in zip(encoded, rows, strict=True)
        ]  # fmt: skip

    def collate(rows: Sequence[TokenRow]) -> TokenRow:
        fills = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0}
        padded = {
            key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=fill)
            for key, fill in fills.items()
        }
        return {**padded, "labels": torch.stack([row["labels"] for row in rows])}

    train, validation = split(parts[0], task.num_validation)
    _, test = split(parts[1], task.num_test)
    return TaskData(
        task.name, tokenised(train), tokenised(validation), tokenised(test), collate, num_labels=len(labels)
    )


def split(rows: Sequence[Any], num_held_out: int) -> tuple[list[Any], list[Any]]:
    """The rows without `num_held_out` of them (all, if there are no more), and these; the same at every call."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    return [rows[i] for i in order[num_held_out:]], [rows[i] for i in order[:num_held_out]]


def _read_labelled(path: Path) -> list[tuple[str, str]]:
    """Texts with labels: of a .csv its columns `text` and `category`, of a .tsv without a header its two cells."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return [(row["text"], row["category"]) for row in csv.DictReader(file)]
        rows = [line.rstrip("\r\n").split("\t") for line in file]
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise ValueError(f"{path}, line {number}: has {len(row)} cells; a row is a text, a tab and a label")
    return [(text, label) for text, label in rows]


def _language(task: Task, folder: Path, tokenizer: Any) -> TaskData:
    train_file, test_file, text_file = (str(folder / name) for name in task.files)
    options: dict[str, Any] = {"seq_len": task.max_tokens, "seed": SPLIT_SEED}
    learnt = load_text_dataset(train_file, tokenizer, eval_fraction=0, **options)
    tested = load_text_dataset(test_file, tokenizer, eval_fraction=0, **options)
    unrelated = load_text_dataset(text_file, tokenizer, eval_fraction=0.05, **options)
    train, validation = split(_all(learnt.train), task.num_validation)
    _, test = split(_all(tested.train), task.num_test)
    _, text = split(_all(unrelated.eval), task.num_validation)
    return TaskData(task.name, train, validation, test, learnt.collate, unrelated=text)


def _all(rows: TokenRows) -> list[TokenRow]:
    return [rows[i] for i in range(len(rows))]


def load_network(task: Task, num_labels: int | None) -> Any:
    """The pretrained model in fp32; a classifier's head is drawn from torch's generator."""
    from transformers import AutoModelForSequenceClassification

    from hift_ds.recipes.models import load_model, source_of

    if num_labels is None:
        return load_model(task.model, dtype=torch.float32)
    return AutoModelForSequenceClassification.from_pretrained(
        source_of(task.model), num_labels=num_labels, dtype=torch.float32
    )


def sums_of(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int, int]:
    """Summed loss, right answers, and how many count: classes [rows], or tokens [rows, tokens] given all before."""
    if labels.ndim == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.flatten(0, -2).float(), labels.flatten()
    kept = labels != IGNORED
    logits, labels = logits[kept], labels[kept]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return loss.item(), int((logits.argmax(-1) == labels).sum()), len(labels)
