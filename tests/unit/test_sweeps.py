"""The sweep scripts and curves.sh: every command that they start is one that its script understands."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hift_ds.recipes.arguments import add_arguments
from launch import compare

LAUNCH = Path(__file__).parents[2] / "launch"
# `python` as the scripts find it: compare.py's commands are noted, not run.
NOTE = '#!/usr/bin/env bash\n[ "$1" = -c ] && exit 0\nprintf "%q " "$@" >> "$NOTES"; echo >> "$NOTES"\n'


def commands_of(script, folder, *options):
    """What a sweep would start."""
    for name in ("python", "deepspeed"):
        program = folder / name
        program.write_text(NOTE)
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "NOTES": str(folder / "notes"),
                   "MODEL": "config.json"}  # fmt: skip
    subprocess.run(["bash", LAUNCH / script, *options], env=environment, check=True, timeout=60, capture_output=True)
    return [shlex.split(line) for line in (folder / "notes").read_text().splitlines()]


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("sweep_*.sh")))
def test_every_command_of_a_sweep_is_one_that_compare_understands(monkeypatch, tmp_path, script):
    commands = commands_of(script, tmp_path, "--retry_failed")
    assert commands
    for command in commands:
        assert Path(command[0]).name == "compare.py"
        monkeypatch.setattr(sys, "argv", command)
        args = compare._arguments()
        assert args.retry_failed and compare._base_config(args) and compare._matrix(args).cells()


def test_the_sweep_of_the_goals_has_each_shape_under_each_limit_and_full_fine_tuning_without_one(tmp_path):
    found = set()
    for command in commands_of("sweep_goals.sh", tmp_path):
        name = Path(command[command.index("--output_dir") + 1]).name
        precision, shape, limit = name.split("_")
        given = command[command.index("--gpu_memory_limit") + 1] if "--gpu_memory_limit" in command else "none"
        micro_batch = command[command.index("--micro_batch") + 1]
        seq_len = command[command.index("--seq_lens") + 1]
        assert (given, f"{micro_batch}x{seq_len}") == (limit, shape)
        assert command[command.index("--precisions") + 1] == precision
        assert ("full" in command) == (limit == "none")
        found.add(name)
    shapes = [f"{precision}_{shape}" for precision in ("bf16", "fp32") for shape in ("6x512", "1x1024")]
    assert found == {f"{shape}_{limit}" for shape in shapes for limit in ("46GiB", "22GiB", "14GiB", "none")}


def test_the_curves_have_full_fine_tuning_and_three_blocks_at_three_rates_each(monkeypatch, tmp_path):
    (tmp_path / "gsm8k_train.jsonl").write_text("")
    (tmp_path / "gsm8k_test.jsonl").write_text("")
    commands = commands_of("curves.sh", tmp_path, tmp_path, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", commands[-3])
    args = compare._arguments()
    assert compare._base_config(args)["zero_optimization"] == {"stage": 2}
    assert [cell.layers_per_block for cell in compare._matrix(args).cells()] == [None, None, 1, 4, 8, 100]
    parser = argparse.ArgumentParser()
    add_arguments(parser, tmp_path / "out" / "config.json")
    found = {"full": set(), 8: set(), 4: set(), 1: set()}
    for command in commands[:-3]:
        assert Path(command[3]).name == "train.py"
        options = parser.parse_args(command[4:])
        assert options.hift == (getattr(options, "hift_update", None) == "backward")
        found[options.hift_layers_per_block if options.hift else "full"].add(options.lr)
    assert {len(rates) for rates in found.values()} == {3}
