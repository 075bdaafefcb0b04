"""Every file in ds_configs/ trains a small model on two ranks, as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hift_testing import error_cases as cases
from hift_testing.selection import slow

pytestmark = pytest.mark.multi_rank

FOLDER = Path(__file__).parents[2] / "ds_configs"
NAMES = [f"zero{stage}_{dtype}" for stage in range(4) for dtype in ("fp32", "bf16", "fp16")]
DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


def test_there_is_no_other_file():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(NAMES)


# Of each stage and each dtype at least one; tests/unit/test_ds_configs.py reads all.
QUICK = ("zero0_fp32", "zero1_bf16", "zero2_bf16", "zero2_fp16", "zero3_bf16")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in NAMES])
def test_every_config_trains(two_ranks, name):
    for facts in two_ranks.run(cases.config_file, str(FOLDER / f"{name}.json"), steps=3):
        assert facts["finite"]
        assert facts["state"] == ["0", "1", "2"]
        assert (facts["stage"], facts["dtype"]) == (int(name[4]), DTYPES[name[6:]])
        assert facts["attempts"] == 3 + facts["skipped"]
        assert facts["skipped"] == 0 or name.endswith("fp16")
        assert facts["windows"] == facts["attempts"]  # in windows of the file's gradient_accumulation_steps
