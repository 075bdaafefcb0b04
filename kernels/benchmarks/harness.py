"""What the kernel benchmarks share: timing in turn, the device's own copy bandwidth, and rows with their provenance."""

from __future__ import annotations

import argparse
import csv
import gc
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
# Of the device before each time is taken, 1 ms at 2 GHz: on an idle device Python and Triton's launches would be in it.
SLEEP_CYCLES = 2_000_000
FIELDS = ("contestant", "numel", "bytes_per_parameter", "p20_ms", "p50_ms", "p80_ms", "gb_per_s", "share_of_copy")


class Missing(Exception):
    """Why a contestant cannot be had here."""


@dataclass
class Contestant:
    """One way to do the same update.

    Attributes:
        make: Allocates its buffers and returns one update; raises `Missing` where it cannot be had.
    """

    name: str
    bytes_per_parameter: float
    make: Callable[[], Callable[[], Any]]


def parser(description: str) -> argparse.ArgumentParser:
    """What the command lines of all benchmarks share."""
    options = argparse.ArgumentParser(allow_abbrev=False, description=description)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="parameters of a shard")
    options.add_argument("--repeats", type=int, default=30)
    options.add_argument("--results_dir", default=str(ROOT / "kernels" / "benchmarks" / "results"))
    return options


def arguments(description: str) -> argparse.Namespace:
    """The command line of every kernel benchmark."""
    return parser(description).parse_args()


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


def new_gradient(numel: int, device: torch.device) -> torch.Tensor:
    """bf16, as reduced."""
    return torch.randn(numel, device=device).to(torch.bfloat16)


def fused(step: Callable[..., None], grad: torch.Tensor, *, moments: int = 1, group: int = 0) -> list[Contestant]:
    """An elementwise kernel, with fp32 masters and with 16-bit remainders.

    Args:
        step: Called with gradient, weights, moments (8-bit codes and scales where there is a `group`) and scalars.
        group: Elements that share a scale; 0 = fp32 moments.
    """
    numel, device = grad.numel(), grad.device

    def contestant(form: str) -> Contestant:
        def make() -> Callable[[], None]:
            weights, scalars = new_weights(numel, device, form), prepared_scalars(device)
            dtype = torch.uint8 if group else torch.float32
            state = [torch.zeros(numel, dtype=dtype, device=device) for _ in range(moments)]
            if group:
                state += [torch.zeros(-(-numel // group), device=device) for _ in range(moments)]
            return lambda: step(grad, weights, *state, scalars)

        moment_bytes = moments * (2 + 8 / group if group else 8)
        name = f"hift_kernels {form} master{', int8' if group else ''}"
        return Contestant(name, 2 + moment_bytes + (10 if form == "fp32" else 8), make)

    return [contestant(form) for form in ("fp32", "split16")]


def chain(
    name: str,
    bytes_per_parameter: float,
    optimizer_of: Callable[[list[torch.nn.Parameter]], Any],
    grad: torch.Tensor,
    shape: tuple[int, ...] | None = None,
) -> Contestant:
    """A step as training loops do it today: cast and unscale, norm and clip, update, cast to the model's dtype."""

    def make() -> Callable[[], None]:
        weight = torch.zeros(shape or grad.shape, dtype=torch.bfloat16, device=grad.device)
        master = torch.nn.Parameter(weight.float())
        optimizer = optimizer_of([master])

        def run() -> None:
            master.grad = grad.float().div_(1.0).view_as(master)
            torch.nn.utils.clip_grad_norm_([master], 1.0)
            optimizer.step()
            weight.copy_(master.detach())

        return run

    return Contestant(f"{name} (chain)", bytes_per_parameter, make)


def benchmark(
    kernel: str, args: argparse.Namespace, contestants: Callable[[int, torch.device], list[Contestant]]
) -> Path:
    """Measures every contestant at every size, in turn, beside a copy of the same device, and writes a dated CSV.

    Where their buffers do not fit together, each is measured alone beside the copy.

    Args:
        kernel: The kernel's file stem.
        contestants: Lists them for a size.
    """
    device, rows = torch.device(args.device), []
    where = provenance(device)
    for numel in args.sizes:
        everyone = contestants(numel, device)
        found = _measure(everyone, numel, device, args.repeats)
        if found is None:
            alone = [_measure([one], numel, device, args.repeats) for one in everyone]
            oom = [[{"contestant": one.name, "numel": numel, "p50_ms": "OOM"}] for one in everyone]
            # A copy's row each: their shares of a copy are of that one.
            found = [row for own, none in zip(alone, oom, strict=True) for row in own or none]
        rows += found
    path = Path(args.results_dir) / f"{where['date']}_{kernel}_{slug(where['device'])}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    common = {"date": where["date"], "commit": where["commit"], "device": where["device"], "driver": where["driver"],
              **where["versions"]}  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*FIELDS, *common))
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
    _print(rows)
    print(f"wrote {path}")
    return path


def _measure(
    contestants: list[Contestant], numel: int, device: torch.device, repeats: int
) -> list[dict[str, Any]] | None:
    """A row for a copy and for each contestant; None if their buffers do not fit."""
    try:
        return _interleaved(contestants, numel, device, repeats)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _interleaved(contestants: list[Contestant], numel: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    source = torch.empty(numel, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    runners = [Contestant("device copy", 8, lambda: lambda: target.copy_(source)), *contestants]
    runs: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    for one in runners:
        try:
            runs[one.name] = one.make()
        except Missing as error:
            missing[one.name] = str(error)
    for run in runs.values():
        for _ in range(3):  # compiles, warms up
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_milliseconds(run, device))
    rows, copy_rate = [], 0.0
    for one in runners:
        if one.name in missing:
            rows.append({"contestant": one.name, "numel": numel, "p50_ms": f"missing: {missing[one.name]}"})
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
    torch.cuda._sleep(SLEEP_CYCLES)
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


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")[:40]
