"""A save that is cut off anywhere leaves the old checkpoint or the new one; one that fails leaves the old one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from deepspeed import comm as dist
from hift_testing.fingerprints import all_by_block
from hift_testing.messages import error_of
from hift_testing.resuming import seeded_engine
from hift_testing.selection import slow
from hift_testing.training import run_steps

from hift_ds.checkpoint import folder, restore

pytestmark = pytest.mark.multi_rank


class Killed(BaseException):
    """As SIGKILL: nothing that handles errors handles it."""


@contextmanager
def killed_at(number: int) -> Iterator[list[str]]:
    """Ends the process's work at its n-th write to the disk, half of which is done."""
    made: list[str] = []
    here = {
        (os, "fsync"): os.fsync, (Path, "rename"): Path.rename, (Path, "replace"): Path.replace,
        (shutil, "rmtree"): shutil.rmtree, (torch, "save"): torch.save, (Path, "mkdir"): Path.mkdir,
    }  # fmt: skip

    def cut(kind: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(kind)
            if len(made) == number:
                if kind == "rmtree" and Path(args[0]).exists():
                    for path in sorted(Path(args[0]).iterdir())[::2]:
                        path.unlink()
                if kind == "save":
                    Path(args[1]).write_bytes(b"PK half a file")
                raise Killed(kind)
            return original(*args, **kwargs)

        return call

    try:
        for (home, name), original in here.items():
            setattr(home, name, cut(name, original))
        yield made
    finally:
        for (home, name), original in here.items():
            setattr(home, name, original)


def killed_everywhere(root: str, stage: int, same_tag: bool) -> list[str]:
    """Kills a save over an older one at each of its writes, and loads what is there."""
    base = Path(root, "base")
    engine = seeded_engine(stage, "bf16", {"layers_per_block": 3}, 0)
    run_steps(engine, 2)
    engine.save_checkpoint(base, tag="run")
    old = all_by_block(engine)
    run_steps(engine, 2, start=2)
    new, tag = all_by_block(engine), "run" if same_tag else "later"
    number, found = 0, []
    while not found or found[-1] != "whole":
        number += 1
        place = Path(root, str(number))
        shutil.copytree(base, place)
        try:
            with killed_at(number):
                engine.save_checkpoint(place, tag=tag)
            found.append("whole")
        except Killed as error:
            found.append(str(error))
        fresh = seeded_engine(stage, "bf16", {"layers_per_block": 3}, 1)
        path, _ = fresh.load_checkpoint(place)
        assert path is not None
        loaded = all_by_block(fresh)
        assert loaded in (old, new), (number, found)
        assert loaded == new or found[-1] != "whole"
        run_steps(fresh, 1, start=4)
        fresh.save_checkpoint(place, tag=tag)  # what was left lying does not disturb
        assert sorted(path.name for path in place.iterdir()) == sorted({"run", tag, "latest"})
    return found


@pytest.mark.parametrize(("stage", "same_tag"), [slow(0, True), slow(2, False), (3, True)])
def test_a_save_that_is_killed_at_any_write_leaves_the_old_checkpoint_or_the_new_one(
    one_rank, tmp_path, stage, same_tag
):
    (found,) = one_rank.run(killed_everywhere, str(tmp_path), stage, same_tag)
    assert len(found) > 10 and {"fsync", "rename", "replace", "save"} <= set(found)


def failing(root: str, stage: int) -> None:
    """A save that fails on one rank is an error on all, and the old checkpoint is still there."""
    engine = seeded_engine(stage, "bf16", {"layers_per_block": 3}, 0)
    run_steps(engine, 2)
    engine.save_checkpoint(root, tag="run")
    old = all_by_block(engine)
    run_steps(engine, 1, start=2)
    failures = [(torch, "save"), (os, "fsync")]
    for home, name in failures:
        original = getattr(home, name)

        def full(*args: Any, **kwargs: Any) -> Any:
            raise OSError(28, "No space left on device")

        if dist.get_rank() == 1 or (name == "save" and stage < 3 and dist.get_rank() == 0):
            setattr(home, name, full)
        try:
            error = error_of(lambda: engine.save_checkpoint(root, tag="run"))
        finally:
            setattr(home, name, original)
        assert "No space left on device" in error, (name, error)
    error = error_of(lambda: engine.save_checkpoint(Path(root, "latest"), tag="run"))
    assert "latest' is no folder and cannot be made one" in error, error
    free = folder.shutil.disk_usage
    folder.shutil.disk_usage = lambda path: type("Usage", (), {"free": 1000})()  # type: ignore[assignment]
    try:
        error = error_of(lambda: engine.save_checkpoint(root, tag="run"))
    finally:
        folder.shutil.disk_usage = free
    assert "GiB are needed in" in error and "nothing has been written" in error, error
    dist.barrier()
    assert sorted(path.name for path in Path(root).iterdir()) == ["latest", "run"]
    run_steps(engine, 1, start=3)  # it goes on
    fresh = seeded_engine(stage, "bf16", {"layers_per_block": 3}, 1)
    fresh.load_checkpoint(root)
    assert all_by_block(fresh) == old


@pytest.mark.parametrize("stage", (0, 2, 3))
def test_a_save_that_fails_on_a_rank_is_an_error_on_all_and_the_old_checkpoint_is_there(two_ranks, tmp_path, stage):
    two_ranks.run(failing, str(tmp_path), stage)


SAVES_FOR_EVER = """
import sys
from hift_testing.resuming import seeded_engine
from hift_testing.training import run_steps
import hift_ds
hift_ds.init_distributed()
engine = seeded_engine(2, "bf16", {"layers_per_block": 3}, 0)
for step in range(1000):
    run_steps(engine, 1, start=step)
    engine.save_checkpoint(sys.argv[1], tag="run", client_state={"step": step})
    print(step, flush=True)
"""


def replaced(root: str) -> str:
    """Another run saves under the same tag while it is loaded."""
    engine = seeded_engine(2, "bf16", {"layers_per_block": 3}, 0)
    run_steps(engine, 2)
    engine.save_checkpoint(root, tag="run")
    run_steps(engine, 2)
    engine.save_checkpoint(root, tag="other")
    fresh, original = seeded_engine(2, "bf16", {"layers_per_block": 3}, 1), restore.load_position

    def late(*args: Any) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            Path(root, "run").rename(Path(root, "old"))
            Path(root, "other").rename(Path(root, "run"))
        dist.barrier()
        original(*args)

    restore.load_position = late
    try:
        error = error_of(lambda: fresh.load_checkpoint(root, tag="run"))
    finally:
        restore.load_position = original
    fresh.load_checkpoint(root, tag="run")
    assert all_by_block(fresh) == all_by_block(engine)
    return error


def test_a_checkpoint_that_is_replaced_while_it_is_loaded_is_an_error(two_ranks, tmp_path):
    for error in two_ranks.run(replaced, str(tmp_path)):
        assert "was replaced while it was loaded" in error and "load it again" in error


def loaded_step(root: str) -> tuple[int, dict[str, str]]:
    fresh = seeded_engine(2, "bf16", {"layers_per_block": 3}, 1)
    _, state = fresh.load_checkpoint(root)
    return state["step"], all_by_block(fresh)


def trained(steps: int) -> dict[str, str]:
    engine = seeded_engine(2, "bf16", {"layers_per_block": 3}, 0)
    run_steps(engine, steps)
    return all_by_block(engine)


@pytest.mark.slow
def test_ranks_that_are_killed_while_they_save_leave_a_whole_checkpoint(two_ranks, tmp_path):
    """Real processes and SIGKILL, twelve times: what is loaded is what a run of so many steps has."""
    script = tmp_path / "saves.py"
    script.write_text(SAVES_FOR_EVER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu"}
    environment = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    root = tmp_path / "saved"
    for number in range(12):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        process = subprocess.Popen(
            [*command, str(root)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "1":
                break
        time.sleep(0.02 + 0.037 * number)
        # Its ranks have sessions of their own, and would train on.
        for each in (*psutil.Process(process.pid).children(recursive=True), process):
            each.kill()
        process.wait()
        step, found = two_ranks.run(loaded_step, str(root))[0]
        assert found == two_ranks.run(trained, step + 1)[0], (number, step)
