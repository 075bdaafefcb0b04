"""`make gpu`: what starts on a machine with a CUDA device and neither network nor set-up, in parts that end in time."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_GPU_NEEDED = {"tests/fused/test_ahead_of_time.py"}  # compiles for cards that are not there
PARTS = ("gpu-kernels", "gpu-streaming", "gpu-training", "gpu-peers", "gpu-forecast", "gpu-benchmarks")
# PYTHON as make calls it: arguments and environment are noted, nothing is run.
NOTE = """#!/usr/bin/env bash
echo "$*" >> "$NOTES"
echo "$PYTHONPATH $TRITON_INTERPRET $HIFT_TEST_DEVICE $DS_ACCELERATOR" >> "$NOTES"
"""


def started_by(target, folder):
    """(arguments, environment) of each time that a target starts PYTHON."""
    python = folder / "python"
    python.write_text(NOTE)
    python.chmod(0o755)
    environment = {**os.environ, "NOTES": str(folder / "notes"), "PYTHONPATH": "wheels"}
    environment.pop("MAKEFLAGS", None)
    command = ["make", target, f"PYTHON={python}", f"VENV={folder / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("timeout ") == done.stdout.count(str(python)), "each part ends in time"
    lines = (folder / "notes").read_text().splitlines()
    return list(zip(lines[::2], lines[1::2], strict=True))


@pytest.mark.parametrize("target", PARTS)
def test_a_part_needs_no_set_up_and_takes_the_device(target, tmp_path):
    (run,) = started_by(target, tmp_path)
    assert run[0].startswith("-m pytest ")
    assert run[1] == f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}:wheels 0 cuda cuda"
    assert not (tmp_path / "venv").exists()


def test_the_parts_together_run_every_test_for_a_device_once(tmp_path):
    runs = [arguments.split() for arguments, _ in started_by("gpu", tmp_path)]
    assert len(runs) == len(PARTS)
    found = []
    for words in runs:
        left_out = {words[place + 1] for place, word in enumerate(words) if word == "--ignore"}
        for name in {word for word in words if word.startswith("tests/")} - left_out:
            path = ROOT / name
            files = [path] if path.is_file() else path.glob("test_*.py")
            found += [file.relative_to(ROOT).as_posix() for file in files]
        found = [name for name in found if name not in left_out]
    rooms = [ROOT / "tests" / room for room in ("fused", "gpu", "peers")]
    wanted = {path.relative_to(ROOT).as_posix() for room in rooms for path in room.glob("test_*.py")}
    assert sorted(found) == sorted(wanted - NO_GPU_NEEDED)
