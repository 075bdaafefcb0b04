"""Every file in ds_configs/ trains a small model on two ranks, as it is."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
from hift_testing.fingerprints import changed, state_by_block
from hift_testing.selection import slow
from hift_testing.training import DTYPES, engine_of, fp16_allowed, run_steps, small_llama

pytestmark = pytest.mark.multi_rank

FOLDER = Path(__file__).parents[2] / "ds_configs"
NAMES = [f"zero{stage}_{dtype}" for stage in range(4) for dtype in ("fp32", "bf16", "fp16")]


def test_there_is_no_other_file():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(NAMES)


def trains(name: str) -> None:
    """A file of ds_configs/ as it is, until three steps are applied."""
    path, half = FOLDER / f"{name}.json", name.endswith("fp16")
    with fp16_allowed() if half else nullcontext():
        engine = engine_of(str(path), small_llama())
    assert engine.zero_optimization_stage() == int(name[4])
    assert next(engine.module.parameters()).dtype == DTYPES[name[6:]]
    losses, attempts, before = [], 0, state_by_block(engine)
    while engine.hift.active_block < 3 and attempts < 12:
        losses += run_steps(engine, 1, start=attempts)
        attempts += 1
    assert all(map(math.isfinite, losses))
    assert changed(before, state_by_block(engine)) == ["0", "1", "2"]
    assert attempts == 3 + engine.skipped_steps
    assert engine.skipped_steps == 0 or half
    # in windows of the file's gradient_accumulation_steps
    assert len(losses) == attempts * json.loads(path.read_text()).get("gradient_accumulation_steps", 1)


# Of each stage and each dtype at least one; tests/unit/test_ds_configs.py reads all.
QUICK = ("zero0_fp32", "zero1_bf16", "zero2_bf16", "zero2_fp16", "zero3_bf16")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in NAMES])
def test_every_config_trains(two_ranks, name):
    two_ranks.run(trains, name)
