"""Stopping and going on: a signal that saves, and what must be the same. Imports no torch."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hift_ds.config.batch import ACCUMULATION, MICRO, TRAIN

RUN = "run.json"  # in the folder of checkpoints
_OF_THE_MACHINE = {MICRO, ACCUMULATION, TRAIN, "tensorboard", "steps_per_print", "wandb", "csv_monitor"}


class Stop:
    """Whether somebody wants the run to end: SIGTERM, where it is heard.

    Args:
        hears: Take the signal, whose default is to end the process at once.
    """

    def __init__(self, hears: bool) -> None:
        self.asked = False
        if hears:
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True


def described(args: argparse.Namespace, config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """What decides how a run trains, but for the machine that it is on.

    Args:
        args: Of the command line.
        config: DeepSpeed's, as it is used.
        rows: Of an optimizer step, over all ranks and micro steps.
    """
    sources = {name: _moved(getattr(args, name)) for name in ("model_name_or_path", "dataset")}
    options = {name: getattr(args, name) for name in ("seq_len", "pack", "seed", "loss", "hift")}
    kept = {key: value for key, value in config.items() if key not in _OF_THE_MACHINE}
    if "hift" in kept:
        kept["hift"] = {key: value for key, value in kept["hift"].items() if key != "asynchronous_save"}
    return json.loads(json.dumps({**sources, **options, "rows of a step": rows, **kept}))


def _moved(source: str) -> str:
    """A file or folder by its own name, wherever it is."""
    return Path(source).resolve().name if Path(source).exists() else source


def require_same(folder: Path, present: Mapping[str, Any]) -> None:
    """Raises ValueError where the checkpoints of a folder are of a run that was described otherwise."""
    path = folder / RUN
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    found = [f"{key} was {then} and is {now} now" for key, then, now in _differences(before, present)]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"--resume: {'; '.join(found[:3])}{more}: go on with what it was, or say --allow_changed")


def _differences(
    before: Mapping[str, Any], present: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, str, str]]:
    for key in sorted(before.keys() | present.keys()):
        then, now, name = before.get(key), present.get(key), f"{path}{key}"
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            yield from _differences(then, now, f"{name}.")
        elif then != now:
            yield name, json.dumps(then), json.dumps(now)

