"""What the kernel benchmarks share: timing in turn, the device's own copy bandwidth, and rows with their provenance."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from hift_ds.recipes.results import provenance  # noqa: E402

SIZES = (50_000_000, 202_379_264, 1_000_000_000)  # 202 M: a layer of a 7B Llama
FIELDS = ("contestant", "numel", "bytes_per_parameter", "p20_ms", "p50_ms", "p80_ms", "gb_per_s", "share_of_copy")


@dataclass
class Contestant:
    """One way to do the same update; `None` instead of `run` says why it cannot be had here."""

    name: str
    bytes_per_parameter: float
    run: Callable[[], Any] | None
    missing: str = ""


def arguments(description: str) -> argparse.Namespace:
    """The command line of every kernel benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="parameters of a shard")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--results_dir", default=str(ROOT / "kernels" / "benchmarks" / "results"))
    return parser.parse_args()


def new_weights(numel: int, device: torch.device, form: str) -> Any:
    """bf16 weights with a master of one of the kernels' forms."""
    from hift_kernels.launching import FORMS, Weights

    weight = torch.randn(numel, device=device).to(torch.bfloat16)
    second = FORMS[form][2]
    if second is None:
        return Weights(form, weight)
    return Weights(form, weight, weight.float() if form == "fp32" else torch.zeros(numel, dtype=second, device=device))


def prepared_scalars(device: torch.device, square: torch.Tensor | None = None, into: Any = None) -> torch.Tensor:
    """The vector of scalars of a step that clips, from `square` (1 if not given), written into `into` or anew."""
    from hift_kernels.grad_norm import prepare
    from hift_kernels.launching import NUM_SCALARS

    one = torch.ones(1, dtype=torch.float64, device=device)
    scalars = torch.zeros(NUM_SCALARS, device=device) if into is None else into
    prepare(one if square is None else square, one, scalars, lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01,
            max_norm=1.0, bias_correction=True)  # fmt: skip
    return scalars


def torch_chain(optimizer: Any, master: torch.nn.Parameter, weight: torch.Tensor, grad: torch.Tensor) -> Callable:
    """A step as training loops do it today: cast and unscale, norm and clip, update, cast to the model's dtype."""

    def run() -> None:
        master.grad = grad.float().div_(1.0)
        torch.nn.utils.clip_grad_norm_([master], 1.0)
        optimizer.step()
        weight.copy_(master.detach())

    return run


def benchmark(
    kernel: str, args: argparse.Namespace, contestants: Callable[[int, torch.device], list[Contestant]]
) -> Path:
    """Measures every contestant at every size, in turn, beside a copy of the same device, and writes a dated CSV.

    Args:
        kernel: The kernel's file stem.
        contestants: Makes them for a size; what they hold is freed before the next size.
    """
    device, rows = torch.device(args.device), []
    where = provenance(device)
    for numel in args.sizes:
        try:
            rows += _measure(contestants(numel, device), numel, device, args.repeats)
        except torch.cuda.OutOfMemoryError:
            rows.append({"contestant": "all", "numel": numel, "p50_ms": "OOM"})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    path = Path(args.results_dir) / f"{where['date']}_{kernel}_{_slug(where['device'])}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    common = {"date": where["date"], "commit": where["commit"], "device": where["device"], "driver": _driver(device),
              **where["versions"]}  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*FIELDS, *common))
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
    _print(rows)
    print(f"wrote {path}")
    return path


def _measure(contestants: list[Contestant], numel: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    source = torch.empty(numel, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    runners = [Contestant("device copy", 8, lambda: target.copy_(source)), *contestants]
    times: dict[str, list[float]] = {one.name: [] for one in runners}
    for one in runners:
        for _ in range(3):  # compiles, warms up
            if one.run is not None:
                one.run()
    for _ in range(repeats):
        for one in runners:
            if one.run is not None:
                times[one.name].append(_milliseconds(one.run, device))
    rows, copy_rate = [], 0.0
    for one in runners:
        if one.run is None:
            rows.append({"contestant": one.name, "numel": numel, "p50_ms": f"missing: {one.missing}"})
            continue
        p20, _, _, p80 = quantiles(times[one.name], n=5)
        p50 = sorted(times[one.name])[repeats // 2]
        rate = one.bytes_per_parameter * numel / p50 / 1e6
        copy_rate = copy_rate or rate
        values = (one.name, numel, one.bytes_per_parameter, p20, p50, p80, rate, rate / copy_rate)
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in zip(FIELDS, values, strict=True)})
    return rows


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for header in ("contestant", "parameters", "ms (p50)", "GB/s", "of copy"):
        table.add_column(header, justify="left" if header == "contestant" else "right")
    for row in rows:
        numbers = [row["p50_ms"], "", ""]
        if "gb_per_s" in row:
            numbers = [f"{row['p50_ms']:.3f}", f"{row['gb_per_s']:.1f}", f"{row['share_of_copy']:.2f}"]
        table.add_row(row["contestant"], f"{row['numel']:,}", *numbers)
    Console().print(table)


def _driver(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.splitlines()[0].strip() if found.stdout else "unknown"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")[:40]
