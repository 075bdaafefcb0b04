"""Random damage to a checkpoint: refused on every rank before anything is changed, or no damage at all."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from deepspeed import comm as dist
from hift_testing.fingerprints import all_by_block
from hift_testing.fuzzing import count, examples
from hift_testing.messages import error_of, is_clear
from hift_testing.resuming import seeded_engine
from hift_testing.training import run_steps
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.multi_rank
ENGINES: dict[int, Any] = {}  # on a rank, by stage
KINDS = ("flip", "cut", "grow", "zero", "remove", "swap", "other save", "shuffle", "rename", "folder")


def written(folder: str, stage: int) -> None:
    """Two saves of one run, and the engine that loads what becomes of them."""
    engine = seeded_engine(stage, "bf16", {"layers_per_block": 3}, 0)
    for tag in ("older", "good"):
        run_steps(engine, 2, start=engine.global_steps)
        engine.save_checkpoint(folder, tag=tag)
    ENGINES[stage] = seeded_engine(stage, "bf16", {"layers_per_block": 3}, 1)


def damage(root: Path, kind: str, draw: random.Random) -> None:
    place = root / "bad"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(root / "good", place)
    files = sorted(place.iterdir())
    path, other = draw.choice(files), draw.choice(files)
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "grow":
        content += draw.randbytes(draw.randint(1, 64))
    elif kind == "zero":
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    elif kind == "shuffle":
        middle = content[at : at + 64]
        draw.shuffle(middle)
        content[at : at + 64] = middle
    elif kind == "swap":
        theirs = other.read_bytes()
        other.write_bytes(content)
        content = bytearray(theirs)
    elif kind == "other save":
        content = bytearray((root / "older" / path.name).read_bytes())
    path.write_bytes(content)
    if kind in ("remove", "folder"):
        path.unlink()
    if kind == "folder":
        path.mkdir()
    if kind == "rename":
        path.rename(path.with_name(path.name + "x"))


def loaded(folder: str, stage: int, kind: str, seed: int) -> str:
    """How a load ends on this rank."""
    engine, root = ENGINES[stage], Path(folder)
    if dist.get_rank() == 0:
        damage(root, kind, random.Random(seed))
    dist.barrier()
    before = (all_by_block(engine), engine.global_steps, engine.optimizer.rotation.step)
    error = error_of(lambda: engine.load_checkpoint(folder, tag="bad"))
    after = (all_by_block(engine), engine.global_steps, engine.optimizer.rotation.step)
    if error:
        assert is_clear(error) and error.startswith(("RuntimeError: ", "ValueError: ")), error
        assert after == before, error
        return "refused"
    engine.load_checkpoint(folder, tag="good")
    same = (all_by_block(engine), engine.global_steps, engine.optimizer.rotation.step)
    assert after == same, "a damaged one is taken"
    engine.load_checkpoint(folder, tag="older")
    return "no damage"


@pytest.fixture(scope="module")
def saved(two_ranks, tmp_path_factory):
    """Folders by stage."""
    folders = {stage: str(tmp_path_factory.mktemp(f"stage{stage}")) for stage in (2, 3)}
    for stage, folder in folders.items():
        two_ranks.run(written, folder, stage)
    return folders


@pytest.mark.gathers
@examples(60)
@given(st.sampled_from([2, 3]), st.sampled_from(KINDS), st.integers(0, 2**31))
def test_damage_is_refused_on_every_rank_before_anything_is_changed(two_ranks, saved, stage, kind, seed):
    found = two_ranks.run(loaded, saved[stage], stage, kind, seed)
    assert len(set(found)) == 1, found
    count(f"checkpoints: {kind}", found[0])
