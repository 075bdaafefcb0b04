"""What results files say: where their figures come from, and the times of steps."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy

_DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def provenance(device: Any) -> dict[str, Any]:
    """Date, commit, device and versions of this run."""
    import deepspeed
    import torch
    import transformers

    versions = {"torch": torch, "deepspeed": deepspeed, "transformers": transformers}
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _said_by("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}: {_processor()}",
        "driver": _said_by(*_DRIVER) if device.type == "cuda" else "",
        "versions": {"python": platform.python_version(), **{k: v.__version__ for k, v in versions.items()}},
    }


def step_times(seconds: Sequence[float], cycle: int, tokens: int) -> dict[str, Any]:
    """What a row says of time, from the mean seconds of a step in each whole cycle of `cycle` steps of `tokens`."""
    if not seconds:
        return {"step_ms": None, "timed_cycles": 0, "timed_steps": 0, "tokens_per_s": None}
    low, middle, high = (round(1000 * float(value), 3) for value in numpy.quantile(seconds, (0.2, 0.5, 0.8)))
    return {
        "step_ms": {"p20": low, "p50": middle, "p80": high},
        "timed_cycles": len(seconds),
        "timed_steps": cycle * len(seconds),
        "tokens_per_s": tokens / fmean(seconds),
        "cycles": {"steps": cycle, "tokens_per_step": tokens, "step_s": list(seconds)},
    }


def join_rounds(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of the same run, done again, as one: times over the cycles of all rounds, the rest of the first.

    A round that failed counts only if all did.
    """
    done = [result for result in rounds if result["status"] == "ok"] or list(rounds[:1])
    first = {**done[0], "rounds": len(done)}
    if len(done) == 1 or not first.get("cycles"):
        return first
    seconds = [second for result in done for second in result["cycles"]["step_s"]]
    return first | step_times(seconds, first["cycles"]["steps"], first["cycles"]["tokens_per_step"])


def _said_by(*command: str) -> str:
    """The first line that a program prints; `unknown` where it is missing or prints nothing, as git in containers."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.partition("\n")[0].strip() or "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()
