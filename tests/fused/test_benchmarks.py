"""Every kernel benchmark runs at tiny size where there is no GPU, and writes what a reader needs to repeat it."""

import csv
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
HELPERS = {"__init__", "launching", "rounding", "scalars", "adafactor_squares"}
KERNELS = sorted({path.stem for path in (FOLDER.parent / "hift_kernels").glob("*.py")} - HELPERS)


def test_each_kernel_has_a_benchmark_of_its_name():
    assert {"adamw", "adamw_int8", "sgd", "lion", "adagrad", "adafactor", "grad_norm"} <= set(KERNELS)
    for kernel in KERNELS:
        assert (FOLDER / f"benchmark_{kernel}.py").is_file()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_benchmark_writes_a_row_for_each_contestant_and_size(kernel, tmp_path, monkeypatch):
    path = FOLDER / f"benchmark_{kernel}.py"
    options = ["--device", "cpu", "--sizes", "64", "80", "--repeats", "2", "--results_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(path), run_name="__main__")
    (written,) = tmp_path.iterdir()
    rows = list(csv.DictReader(written.open()))
    names = [row["contestant"] for row in rows if row["numel"] == "64"]
    assert names == [row["contestant"] for row in rows if row["numel"] == "80"]
    assert names[0] == "device copy" and any(name.startswith("hift_kernels") for name in names)
    assert any(row["p50_ms"][0].isdigit() for row in rows if row["contestant"].startswith("hift_kernels"))
    for row in rows:
        assert row["commit"] and row["date"] and row["device"].startswith("cpu") and row["torch"]
        assert row["p50_ms"].startswith("missing: ") or float(row["p50_ms"]) > 0
