"""`save_checkpoint(..., asynchronous=True)`: the same files, written while training goes on, each before its turn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from deepspeed import comm as dist
from hift_testing.fingerprints import all_by_block
from hift_testing.messages import error_of, logged
from hift_testing.resuming import seeded_engine
from hift_testing.selection import slow
from hift_testing.training import run_steps

from hift_ds import engine_saving
from hift_ds.checkpoint.background import BackgroundSave
from hift_ds.checkpoint.tensor_files import FileFacts

pytestmark = pytest.mark.multi_rank
SPLIT_INT8 = {"kernel": "triton", "state": {"master": "split16", "moments": "int8"}}
FORMS: dict[str, Any] = {
    "plain": (0, "fp32", {}), "always": (1, "bf16", {"always_active": ["norm"], "order": "random"}),
    "split": (2, "bf16", SPLIT_INT8), "sharded": (3, "bf16", {"frozen": ["layers.1.mlp.up"]}),
    "sharded-split": (3, "bf16", SPLIT_INT8), "backward": (2, "bf16", {"update": "backward", "layers_per_block": 2}),
}  # fmt: skip


def slowed(seconds: float) -> list[str]:
    """From now on each file takes so long; their names, as they are begun."""
    begun: list[str] = []
    original = engine_saving.write_tensors

    def write(path: Path, *rest: Any) -> FileFacts:
        begun.append(path.name)
        time.sleep(seconds)
        return original(path, *rest)

    engine_saving.write_tensors = write  # type: ignore[assignment]
    return begun


def unslowed(original: Any) -> None:
    engine_saving.write_tensors = original


def same_files(root: str, form: str) -> tuple[float, float]:
    """A save in the background while two cycles train, beside one before them; seconds of the call, and of both."""
    stage, dtype, hift = FORMS[form]
    engine = seeded_engine(stage, dtype, hift, 0, scheduler=True)
    run_steps(engine, 8)
    engine.save_checkpoint(root, tag="waited")
    original = engine_saving.write_tensors
    begun = slowed(0.05)
    try:
        began = time.monotonic()
        engine.save_checkpoint(root, tag="meanwhile", asynchronous=True)
        stalled = time.monotonic() - began
        run_steps(engine, 12, start=8)
        engine.finish_saving()
        seconds = time.monotonic() - began
    finally:
        unslowed(original)
    parts = len(engine.hift.blocks) + bool(engine.block_plan.always_active)
    assert len(begun) == (parts if stage or dist.get_rank() == 0 else 0) + 1
    dist.barrier()
    waited, meanwhile = (Path(root, tag) for tag in ("waited", "meanwhile"))
    assert Path(root, "latest").read_text() == "meanwhile"
    names = sorted(path.name for path in waited.iterdir())
    assert names == sorted(path.name for path in meanwhile.iterdir())
    assert [n for n in names if n.endswith("s") and (waited / n).read_bytes() != (meanwhile / n).read_bytes()] == []
    fresh = []
    for tag in ("waited", "meanwhile"):
        again = seeded_engine(stage, dtype, hift, 1, scheduler=True)
        again.load_checkpoint(root, tag=tag)
        run_steps(again, 2, start=8)
        fresh.append(all_by_block(again))
    assert fresh[0] == fresh[1]
    return stalled, seconds


@pytest.mark.parametrize("form", ["always", "sharded", "backward", *map(slow, ("plain", "split", "sharded-split"))])
def test_what_is_written_while_training_goes_on_is_what_was_there_at_the_call(two_ranks, tmp_path, form):
    for stalled, seconds in two_ranks.run(same_files, str(tmp_path), form):
        assert stalled < seconds


def failing(root: str, stage: int) -> None:
    """What goes wrong is an error of the next save, or of finish_saving, on every rank; the old checkpoint is there."""
    engine = seeded_engine(stage, "bf16", {}, 0)
    run_steps(engine, 2)
    engine.save_checkpoint(root, tag="run")
    old = all_by_block(engine)
    run_steps(engine, 1, start=2)
    original = engine_saving.write_tensors

    def full(path: Path, *rest: Any) -> FileFacts:
        if "block_1." in path.name and (stage == 0 or dist.get_rank() == 1):
            raise OSError(28, "No space left on device")
        return original(path, *rest)

    engine_saving.write_tensors = full  # type: ignore[assignment]
    try:
        engine.save_checkpoint(root, tag="run", asynchronous=True)
        run_steps(engine, 7, start=3)
        error = error_of(lambda: engine.save_checkpoint(root, tag="other"))
        assert "No space left on device" in error, error
        assert error_of(engine.finish_saving) == ""  # it is said once
        with logged("hift_ds.engine_saving") as errors:
            engine.save_checkpoint(root, tag="run", asynchronous=True)
            engine.destroy()
        # At stage 0 rank 0 alone writes.
        assert any("is not there" in text for text in errors) or (stage == 0 and dist.get_rank() == 1), errors
    finally:
        unslowed(original)
    dist.barrier()
    assert sorted(path.name for path in Path(root).iterdir()) == ["latest", "run"]
    fresh = seeded_engine(stage, "bf16", {}, 1)
    fresh.load_checkpoint(root)
    assert all_by_block(fresh) == old


@pytest.mark.parametrize("stage", [0, 2])
def test_an_error_in_the_background_is_said_at_the_next_save_and_the_old_checkpoint_stays(two_ranks, tmp_path, stage):
    two_ranks.run(failing, str(tmp_path), stage)


def disturbed(root: str) -> None:
    """Weights that are masters' halves, written by the user before they are on the disk; and a load meanwhile."""
    engine = seeded_engine(2, "bf16", {"kernel": "triton", "state": {"master": "split16"}}, 0)
    run_steps(engine, 2)
    engine.save_checkpoint(root, tag="good")
    original = engine_saving.write_tensors
    slowed(0.2)
    try:
        engine.save_checkpoint(root, tag="bad", asynchronous=True)
        engine.module.model.layers[3].mlp.up_proj.weight.data.mul_(2)  # which torch does not count
        assert "were written while they were saved" in error_of(engine.finish_saving)
        engine.load_checkpoint(root, tag="good")
        before = all_by_block(engine)
        engine.save_checkpoint(root, tag="next", asynchronous=True)
        engine.load_checkpoint(root, tag="next")  # waits for it
        assert all_by_block(engine) == before
    finally:
        unslowed(original)


def written_half_way(root: str, hift: dict[str, Any], after: bool) -> str:
    """Weights are written just before the file that has them is, or after it."""
    engine = seeded_engine(2, "bf16", hift, 0)
    original, weight = engine_saving.write_tensors, engine.module.model.layers[2].mlp.up_proj.weight

    def disturbed_write(path: Path, *rest: Any) -> FileFacts:
        if "block_3." in path.name and not after:
            weight.data.mul_(2)
        facts = original(path, *rest)
        if "block_3." in path.name and after:
            weight.data.mul_(2)
        return facts

    engine_saving.write_tensors = disturbed_write  # type: ignore[assignment]
    try:
        engine.save_checkpoint(root, asynchronous=True)
        return error_of(engine.finish_saving)
    finally:
        unslowed(original)


def test_weights_that_are_written_half_way_are_an_error_where_they_are_in_the_file(two_ranks, tmp_path):
    split = {"kernel": "triton", "state": {"master": "split16"}}
    errors = two_ranks.run(written_half_way, str(tmp_path / "split"), split, False)
    assert all("were written while they were saved" in error for error in errors)
    assert two_ranks.run(written_half_way, str(tmp_path / "after"), split, True) == ["", ""]
    assert two_ranks.run(written_half_way, str(tmp_path / "fp32"), {}, False) == ["", ""]


def test_weights_that_are_written_meanwhile_are_an_error_and_a_load_waits(two_ranks, tmp_path):
    two_ranks.run(disturbed, str(tmp_path))


def test_a_job_that_is_needed_first_is_done_first_and_once():
    order: list[str] = []

    def job(name: str) -> Any:
        def work() -> dict[str, FileFacts]:
            order.append(name)
            time.sleep(0.02)
            return {name: FileFacts(1, name)}

        return work

    ended: list[Any] = []
    save = BackgroundSave({name: job(name) for name in "abcdefgh"}, lambda *found: ended.append(found))
    save.ensure("h")
    assert "h" in order and order.index("h") < 4
    save.ensure("h")
    save.ensure("a")
    save.wait()
    ((files, error),) = ended
    assert sorted(order) == sorted("abcdefgh") == sorted(files) and error is None


def twice(root: str) -> list[str]:
    """Two engines of one process save in the background, under one tag."""
    engines = [seeded_engine(2, "bf16", {}, seed) for seed in (0, 1)]
    original = engine_saving.write_tensors
    slowed(0.1)
    try:
        engines[0].save_checkpoint(root, tag="run", asynchronous=True)
        errors = [error_of(lambda: engines[1].save_checkpoint(root, tag="run", asynchronous=True))]
    finally:
        unslowed(original)
    engines[0].finish_saving()
    errors.append(error_of(lambda: engines[1].save_checkpoint(root, tag="run", asynchronous=True)))
    engines[1].finish_saving()
    engines[0].load_checkpoint(root, tag="run")
    return [*errors, "" if all_by_block(engines[0]) == all_by_block(engines[1]) else "other weights"]


def test_a_tag_that_another_engine_writes_is_refused(two_ranks, tmp_path):
    for during, later, apart in two_ranks.run(twice, str(tmp_path)):
        assert "is being written in the background by another engine: call its finish_saving() first" in during
        assert (later, apart) == ("", "")
