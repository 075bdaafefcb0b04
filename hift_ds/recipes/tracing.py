"""How much of the copies between host and device computation hides: read off a profiler's trace of whole steps."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

Interval = tuple[float, float]
_SHOWN = 12  # kernels named in a result


def require_trace(device_type: str) -> None:
    """Raises ValueError where nothing would be traced."""
    if device_type != "cuda":
        raise ValueError(f"--trace: reads CUDA's kernels and copies, and this run is on a {device_type}; leave it out")


def traced(work: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Does `work`, which makes `steps` steps on the CUDA device, and says where their time went (`overlap`)."""
    torch.cuda.synchronize()
    # Without the host's own events, which slow the steps.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return overlap(json.loads(path.read_text())["traceEvents"], steps)


def overlap(events: Iterable[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Milliseconds of a step in the mean over `steps`, from the events of a Chrome trace (`ts`, `dur`: microseconds).

    `step_ms` is from the first event on the device to the last. Of it some kernel runs for `kernels_ms`, no kernel but
    some copy between host and device for `exposed_copies_ms`, neither for `idle_ms`. `to_device` and `to_host`: how
    long such a copy runs and how many bytes it moves.

    Raises:
        RuntimeError: No kernel among the events.
    """
    found: dict[str, list[Interval]] = {"kernels": [], "to_device": [], "to_host": []}
    bytes_of: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in events:
        kind = _kind(event)
        if kind is not None:
            found[kind].append((event["ts"], event["ts"] + event["dur"]))
            bytes_of[kind] += event.get("args", {}).get("bytes", 0)
            if kind == "kernels":
                kernels[event["name"]] += event["dur"]
    if not found["kernels"]:
        raise RuntimeError("--trace: the profiler saw no kernel on the device; run without it")
    busy = _union(found["kernels"])
    all_of_it = _union(interval for intervals in found.values() for interval in intervals)
    whole = all_of_it[-1][1] - all_of_it[0][0]
    each = 1e3 * steps  # microseconds of all steps to milliseconds of one
    return {
        "steps": steps,
        "step_ms": whole / each,
        "kernels_ms": _length(busy) / each,
        "exposed_copies_ms": (_length(all_of_it) - _length(busy)) / each,
        "idle_ms": (whole - _length(all_of_it)) / each,
        **{
            way: {"ms": _length(_union(found[way])) / each, "bytes": bytes_of[way] / steps}
            for way in ("to_device", "to_host")
        },
        "longest_kernels_ms": {name[:100]: time / each for name, time in kernels.most_common(_SHOWN)},
    }


def _kind(event: dict[str, Any]) -> str | None:
    """What an event of the device is: copies on the device count as kernels."""
    category = event.get("cat")
    if category == "gpu_memcpy":
        if "HtoD" in event["name"]:
            return "to_device"
        if "DtoH" in event["name"]:
            return "to_host"
    return "kernels" if category in ("kernel", "gpu_memset", "gpu_memcpy") else None


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals, in order, that cover the same times."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)
