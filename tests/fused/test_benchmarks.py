"""Every kernel benchmark runs at tiny size, and writes what a reader needs to repeat it.

On the CPU, interpreted, or where HIFT_TEST_DEVICE says (`make gpu-benchmarks`), compiled.
"""

import csv
import itertools
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from hift_testing.selection import slow

DEVICE = os.environ.get("HIFT_TEST_DEVICE", "cpu")
FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
HELPERS = {"__init__", "launching", "rounding", "scalars", "adafactor_squares", "quantize", "probe"}
KERNELS = sorted({path.stem for path in (FOLDER.parent / "hift_kernels").glob("*.py")} - HELPERS)


def test_each_kernel_has_a_benchmark_of_its_name():
    assert {"adamw", "int8", "sgd", "lion", "adagrad", "adafactor", "grad_norm"} <= set(KERNELS)
    for kernel in KERNELS:
        assert (FOLDER / f"benchmark_{kernel}.py").is_file()


@pytest.mark.parametrize("kernel", [name if name in ("adamw", "grad_norm") else slow(name) for name in KERNELS])
def test_a_benchmark_writes_a_row_for_each_contestant_and_size(kernel, tmp_path, monkeypatch):
    path = FOLDER / f"benchmark_{kernel}.py"
    options = ["--device", DEVICE, "--sizes", "64", "80", "--repeats", "2", "--results_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(path), run_name="__main__")
    tables = [list(csv.DictReader(path.open())) for path in tmp_path.iterdir()]
    assert len(tables) == (3 if kernel == "int8" else 1)
    for rows in tables:
        names = [row["contestant"] for row in rows if row["numel"] == "64"]
        assert names == [row["contestant"] for row in rows if row["numel"] == "80"]
        assert names[0] == "device copy" and any(name.startswith("hift_kernels") for name in names)
        assert any(row["p50_ms"][0].isdigit() for row in rows if row["contestant"].startswith("hift_kernels"))
    for row in itertools.chain(*tables):
        assert row["commit"] and row["date"] and row["torch"]
        assert row["device"].startswith("cpu") == (DEVICE == "cpu")
        assert row["p50_ms"].startswith("missing: ") or float(row["p50_ms"]) > 0


@pytest.mark.slow
def test_the_benchmark_of_the_ring_writes_a_row_for_each_ring_and_load(tmp_path, monkeypatch):
    path = FOLDER / "benchmark_stream.py"
    rings = ["3 tiles", "half a block", "a block", "resident"]
    options = ["--device", DEVICE, "--sizes", "8192", "--repeats", "2", "--compute_ms", "0", "1"]
    monkeypatch.setattr(sys, "argv", [str(path), *options, "--results_dir", str(tmp_path), "--rings", *rings])
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(path), run_name="benchmark_stream")["main"]()
    (written,) = tmp_path.iterdir()
    rows = list(csv.DictReader(written.open()))
    assert [(row["contestant"], row["compute_ms"]) for row in rows] == [(r, ms) for ms in ("0.0", "1.0") for r in rings]
    assert all(float(row["p50_ms"]) > 0 and row["commit"] and row["torch"] for row in rows)
    sizes = {row["contestant"]: float(row["ring_mib"]) for row in rows}
    assert sizes["resident"] == 0 < sizes["half a block"] <= sizes["a block"]


def test_the_launch_of_a_kernel_is_not_in_its_time(monkeypatch):
    """The device is kept busy while Python and Triton launch, and only then is the time taken."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.syspath_prepend(str(FOLDER))
    milliseconds = runpy.run_path(str(FOLDER / "harness.py"))["_milliseconds"]
    assert milliseconds(lambda: order.append("run"), torch.device("cuda")) == 2.0
    assert order == ["sleep", "event", "run", "event", "wait"]


def test_overlap_is_the_share_of_the_copies_time_that_kernels_cover(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    shared = runpy.run_path(str(FOLDER / "benchmark_stream.py"))["shared"]
    assert shared([(0, 4), (2, 6), (10, 12)], [(1, 3), (5, 11)]) == (2 + 1 + 1) / 8
    assert shared([(0, 4)], []) == 0
    assert shared([], [(0, 4)]) is None
