"""A rank that dies anywhere: the others end with an error, and the run goes on from its checkpoint, bit by bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from deepspeed import comm as dist
from hift_testing.fingerprints import all_by_block
from hift_testing.messages import error_of
from hift_testing.ranks import RankError, RankPool
from hift_testing.resuming import seeded_engine
from hift_testing.selection import slow
from hift_testing.training import run_steps

from hift_ds import engine_saving
from hift_ds.checkpoint import restore
from hift_ds.zero.gradients import GradientReducer
from hift_ds.zero.step import Step

pytestmark = pytest.mark.multi_rank
EVERY, END, AT = 3, 9, 7  # steps: of a save, of the run, and the one in which a rank dies


@pytest.fixture
def own_ranks() -> Iterator[RankPool]:
    """Two ranks that may die."""
    pool = RankPool(2)
    yield pool
    pool.close()


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(home: Any, name: str, number: int = 1) -> None:
    """This process ends at the n-th call."""
    original, left = getattr(home, name), [number]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        return original(*args, **kwargs) if left[0] else die()

    mock.patch.object(home, name, call).start()


def in_forward(engine: Any) -> None:
    engine.module.model.layers[2].register_forward_hook(die)


def in_backward(engine: Any) -> None:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        output.register_hook(die)

    engine.module.model.layers[3].register_forward_hook(hook)


PLACES: dict[str, Callable[[Any], None]] = {
    "forward": in_forward,
    "backward": in_backward,
    "reduction": lambda engine: before(GradientReducer, "finish_backward"),
    "update": lambda engine: before(Step, "_updated", 2),  # of two units
    "save": lambda engine: before(engine_saving, "write_tensors", 2),
    "background": lambda engine: before(engine_saving, "write_tensors", 3),
    "load": lambda engine: before(restore, "load_states"),
}  # fmt: skip


def trained(folder: str, stage: int, place: str | None, hift: dict[str, Any]) -> dict[str, str]:
    """Goes on to the end, with a save at every third step; rank 1 dies at a place of a step."""
    engine = seeded_engine(stage, "bf16", {"layers_per_block": 2, "order": "random", **hift}, 0, scheduler=True)
    dies = place is not None and dist.get_rank() == 1
    if place == "load" and dies:
        PLACES[place](engine)
    engine.load_checkpoint(folder)
    saves = {"asynchronous": True} if place == "background" else {}
    for step in range(engine.global_steps, END):
        if dies and step == AT and place not in ("save", "background", "load"):
            PLACES[place](engine)
        run_steps(engine, 1, start=step)
        if (step + 1) % EVERY == 0:
            if dies and step > AT:
                PLACES[place](engine)
            engine.save_checkpoint(folder, **saves)
    engine.finish_saving()
    return all_by_block(engine)


CASES = [
    (2, "update", {}), slow(3, "update", {}), slow(0, "forward", {}), slow(3, "forward", {}), slow(1, "backward", {}),
    slow(3, "backward", {"update": "backward"}), slow(2, "reduction", {}), slow(0, "reduction", {}),
    slow(1, "save", {}), slow(2, "background", {}), slow(3, "load", {}),
]  # fmt: skip


@pytest.mark.gathers
@pytest.mark.parametrize(("stage", "place", "hift"), CASES)
def test_where_a_rank_is_killed_the_others_end_and_the_run_goes_on(own_ranks, two_ranks, tmp_path, stage, place, hift):
    whole = two_ranks.run(trained, str(tmp_path / "whole"), stage, None, hift)
    folder = str(tmp_path / "cut")
    if place == "load":
        with pytest.raises(RankError):
            own_ranks.run(trained, folder, stage, "forward", hift)
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        own_ranks.run(trained, folder, stage, place, hift)
    seconds = time.monotonic() - began
    assert "rank 1:\nthe process ended" in str(caught.value) and "rank 0:\nTraceback" in str(caught.value)
    assert "no answer" not in str(caught.value), "the other rank did not end"
    assert seconds < 60
    then = (Path(folder) / "latest").read_text()
    assert then == "global_step6"
    assert own_ranks.run(trained, folder, stage, None, hift) == whole


def abandoned(folder: str) -> None:
    """Rank 1 dies while it writes in the background: rank 0 hears of it, and its thread ends."""
    engine = seeded_engine(2, "bf16", {}, 0)
    run_steps(engine, 2)
    engine.save_checkpoint(folder, tag="run")
    if dist.get_rank() == 1:
        before(engine_saving, "write_tensors", 4)
    engine.save_checkpoint(folder, tag="run", asynchronous=True)
    began = time.monotonic()
    engine._background._thread.join(30)
    heard = "" if engine.saves_in_background else error_of(engine._background.wait)
    Path(folder, "heard").write_text(f"{heard}|{time.monotonic() - began}")


def test_a_save_in_the_background_hears_at_once_of_a_rank_that_has_ended(own_ranks, tmp_path):
    with pytest.raises(RankError) as caught:
        own_ranks.run(abandoned, str(tmp_path))
    assert "rank 1:\nthe process ended" in str(caught.value)
    error, seconds = (tmp_path / "heard").read_text().split("|")
    assert "does not come: the process that was to write it has ended" in error
    assert float(seconds) < 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heard", "latest", "run"]


WORKS = """
import os, signal, sys
import torch
from deepspeed import comm as dist
from hift_testing.fingerprints import all_by_block, digest_of
from hift_testing.resuming import seeded_engine
from hift_testing.training import batch_of
import hift_ds

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 9
    def __getitem__(self, step):
        if step == int(sys.argv[2]) and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return batch_of(step, 0, int(os.environ["RANK"]))

hift_ds.init_distributed()
engine = seeded_engine(2, "bf16", {}, 0)
engine.load_checkpoint(sys.argv[1])
rows = torch.utils.data.Subset(Rows(), range(engine.global_steps, 9))
for batch in torch.utils.data.DataLoader(rows, batch_size=None, num_workers=1):
    engine.backward(engine(**batch).loss)
    engine.step()
    if engine.global_steps % 3 == 0:
        engine.save_checkpoint(sys.argv[1])
os.write(1, f"DIGEST {digest_of(all_by_block(engine))}\\n".encode())  # in one piece: two ranks write there
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_where_a_data_worker_is_killed_the_run_ends_and_goes_on(tmp_path):
    script = tmp_path / "works.py"
    script.write_text(WORKS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu"}

    def run(folder: str, dies: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        options = [str(tmp_path / folder), str(dies)]
        return subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=120)

    def digests(done: subprocess.CompletedProcess[str]) -> set[str]:
        return set(re.findall(r"DIGEST (\w+)", done.stdout))

    cut = run("cut", 7)
    assert cut.returncode != 0 and digests(cut) == set()
    assert re.search(r"RuntimeError: DataLoader worker \(pid.* \d+\).*(killed by signal|exited unexp)", cut.stderr)
    assert (tmp_path / "cut" / "latest").read_text() in ("global_step3", "global_step6")  # workers read ahead
    assert digests(run("cut", -1)) == digests(run("whole", -1)) != set()
