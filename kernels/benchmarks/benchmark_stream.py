#!/usr/bin/env python3
"""State that streams through a ring: the time of a step with rings of several sizes, beside state on the device.

    python kernels/benchmarks/benchmark_stream.py
    TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_stream.py --device cpu --sizes 65536 --repeats 3

Three blocks of bf16 weights with fp32 masters and moments take turns, each updated by the fused AdamW after a stand-in
for forward and backward (matrix products of a given time). From a profiler's trace: which share of the copies to and
from the host went on while the device computed.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from harness import parser, provenance, slug

NUM_BLOCKS = 3  # so that a block's next turn is not the next step
RINGS = ("3 tiles", "half a block", "a block", "resident", "on the host")
FIELDS = (
    "contestant", "numel", "ring_mib", "compute_ms", "p20_ms", "p50_ms", "p80_ms", "to_device_overlap",
    "to_host_overlap",
)  # fmt: skip
Interval = tuple[float, float]


@dataclass
class Run:
    """Blocks that take turns; `step(i)` is the whole of the i-th step."""

    step: Callable[[int], None]
    ring_bytes: int


def make(name: str, numel: int, device: torch.device, compute: Callable[[], None]) -> Run:
    """Blocks whose state is kept as `name` says (one of RINGS)."""
    from hift_ds.config.optimizers import rule_from_config
    from hift_ds.shards import UnitShard
    from hift_ds.state.host_memory import HostMemory
    from hift_ds.state.unit_state import MIN_SLOTS, TILE_BYTES, TILE_MULTIPLE, Storage, make_states
    from hift_ds.zero.host_update import HostUpdate
    from hift_ds.zero.update import Scaling, UnitUpdate
    from hift_ds.zero.weights import OwnWeights

    rule, defaults = rule_from_config("AdamW", {"lr": 1e-3, "weight_decay": 0.01})
    params = [torch.nn.Parameter(torch.randn(numel, device=device).bfloat16()) for _ in range(NUM_BLOCKS)]
    shards = [UnitShard([("weight", param)], {"weight": 0}, 1, 0) for param in params]
    groups = [{**defaults, "params": params}]
    block_bytes = 12 * numel
    memory = HostMemory.pinned() if device.type == "cuda" else HostMemory()
    on_host = name == "on the host"
    storage = Storage(device, memory=None if name == "resident" else memory, own_master=on_host)
    least = MIN_SLOTS * 12 * TILE_MULTIPLE
    sizes = {"3 tiles": max(MIN_SLOTS * min(TILE_BYTES, block_bytes // 8), least)}
    sizes["half a block"] = max(block_bytes // 2, least)
    states, ring = make_states([[shard] for shard in shards], rule, groups, storage, sizes.get(name, 2 * block_bytes))
    kind = {"rule": rule, "param_groups": groups, "device": device, "all_reduce": lambda tensor: tensor}
    update: Any = HostUpdate(**kind, states=states) if on_host else UnitUpdate(**kind, kernel="triton", ring=ring)
    grad = torch.randn(states[0].shard.numel, device=device).bfloat16()
    norm = float(numel) ** 0.5 if on_host else None
    scaling = Scaling(1.0, 1.0, norm, torch.full((1,), float(numel), dtype=torch.float64, device=device))

    def step(index: int) -> None:
        compute()
        state = states[index % NUM_BLOCKS]
        update.run(state, grad, OwnWeights(state.shard, device), scaling, [1e-3], index % NUM_BLOCKS)
        if ring is not None:
            ring.prefetch(states[(index + 1) % NUM_BLOCKS].tiles)

    return Run(step, 0 if ring is None else ring.nbytes)


def busy(milliseconds: float, device: torch.device) -> Callable[[], None]:
    """Matrix products that take the device so long, or nothing for 0."""
    side = 4096 if device.type == "cuda" else 64
    matrix = torch.randn(side, side, device=device).bfloat16()

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(matrix, matrix)

    products(10)
    wait(device)
    began = time.perf_counter()
    products(20)
    wait(device)
    each = (time.perf_counter() - began) * 1e3 / 20
    return lambda: products(round(milliseconds / each))


def wait(device: torch.device) -> None:
    """Until the updates are done. Copies of state may go on: a step waits for none of the step before."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def measure(run: Run, device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` cycles, divided by their steps, after one to warm up."""
    times = []
    for cycle in range(repeats + 1):
        wait(device)
        began = time.perf_counter()
        for block in range(NUM_BLOCKS):
            run.step(cycle * NUM_BLOCKS + block)
        wait(device)
        times.append((time.perf_counter() - began) * 1e3 / NUM_BLOCKS)
    return times[1:]


def overlaps(run: Run, device: torch.device) -> tuple[float | None, float | None]:
    """Share of the copies to and from the device that went on while a kernel ran; None where there are none."""
    if device.type != "cuda":
        return None, None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for index in range(2 * NUM_BLOCKS):
            run.step(index)
        torch.cuda.synchronize(device)
    on_device = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    spans = {"HtoD": [], "DtoH": [], "": []}
    for event in on_device:
        kind = next((kind for kind in ("HtoD", "DtoH") if kind in event.name), "")
        if kind or not event.name.startswith(("Memcpy", "Memset")):
            spans[kind].append((event.time_range.start, event.time_range.end))
    return shared(spans["HtoD"], spans[""]), shared(spans["DtoH"], spans[""])


def shared(intervals: Iterable[Interval], others: Iterable[Interval]) -> float | None:
    """Share of the time covered by `intervals` that `others` cover, too; None if it is 0."""
    mine, theirs = _union(intervals), _union(others)
    total = sum(stop - start for start, stop in mine)
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in mine for b in theirs)
    return both / total if total else None


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def row(name: str, numel: int, compute_ms: float, device: torch.device, repeats: int) -> dict[str, Any]:
    """One line of the results; why there is none, in the place of the time."""
    values: dict[str, Any] = {"contestant": name, "numel": numel, "compute_ms": compute_ms}
    try:
        run = make(name, numel, device, busy(compute_ms, device))
        times = measure(run, device, repeats)
        to_device, to_host = overlaps(run, device)
    except torch.cuda.OutOfMemoryError:
        return {**values, "p50_ms": "OOM"}
    except RuntimeError as error:  # DeepSpeed's C++ op cannot be built
        return {**values, "p50_ms": f"missing: {error}"}
    p20, _, _, p80 = quantiles(times, n=5)
    values |= {"ring_mib": round(run.ring_bytes / 2**20, 3), "p20_ms": round(p20, 3), "p80_ms": round(p80, 3)}
    values |= {"p50_ms": round(sorted(times)[len(times) // 2], 3)}
    rounded = [None if share is None else round(share, 3) for share in (to_device, to_host)]
    return {**values, "to_device_overlap": rounded[0], "to_host_overlap": rounded[1]}


def main() -> Path:
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(sizes=[202_379_264], repeats=10)
    options.add_argument("--compute_ms", type=float, nargs="+", default=[0.0, 90.0], help="of forward and backward")
    options.add_argument("--rings", nargs="+", default=list(RINGS), choices=RINGS)
    args = options.parse_args()
    device, rows = torch.device(args.device), []
    for numel in args.sizes:
        for compute_ms in args.compute_ms:
            for name in args.rings:
                rows.append(row(name, numel, compute_ms, device, args.repeats))
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    where = provenance(device)
    common = {"date": where["date"], "commit": where["commit"], "device": where["device"], "driver": where["driver"],
              **where["versions"]}  # fmt: skip
    path = Path(args.results_dir) / f"{where['date']}_stream_{slug(where['device'])}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*FIELDS, *common))
        writer.writeheader()
        writer.writerows({**one, **common} for one in rows)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    sys.exit(main() is None)
