"""The files in ds_configs/: complete, consistent, and valid for plain DeepSpeed. Nothing is trained here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

from hift_ds.config.ds_keys import check_ds_config
from hift_ds.config.keys import HiFTConfig

FOLDER = Path(__file__).parents[2] / "ds_configs"
NAMES = [f"zero{stage}_{dtype}" for stage in range(4) for dtype in ("fp32", "bf16", "fp16")]
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(), object_pairs_hook=dict_raise_error_on_duplicate_keys)


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for part in value.values() for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def test_the_folder_holds_the_twelve_configs_and_no_other():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_stage_and_precision_are_those_of_the_file_name(name):
    stage, dtype = int(name[4]), name[6:]
    config = DeepSpeedConfig(load(name))
    assert config.zero_optimization_stage == stage
    assert config.bfloat16_config.enabled == (dtype == "bf16")
    assert config.float16_config.enabled == (dtype == "fp16")


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_accepts_the_file_and_hift_has_nothing_to_say_against_it(name):
    content = load(name)
    config = DeepSpeedConfig(content)
    assert config.train_micro_batch_size_per_gpu * config.gradient_accumulation_steps == 16
    assert config.gradient_clipping == 1.0
    assert check_ds_config(content) == []
    assert HiFTConfig.from_ds_config(content) is not None


@pytest.mark.parametrize("name", NAMES)
def test_no_value_waits_for_the_hugging_face_trainer(name):
    assert "auto" not in strings(load(name))


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_and_scheduler_can_be_built_and_the_rate_warms_up_and_decays(name):
    content = load(name)
    optimizer_class = getattr(torch.optim, content["optimizer"]["type"])
    optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **content["optimizer"]["params"])
    params = content["scheduler"]["params"]
    scheduler = getattr(lr_schedules, content["scheduler"]["type"])(optimizer, **params)
    rates = []
    for _ in range(params["total_num_steps"]):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    top = content["optimizer"]["params"]["lr"]
    # DeepSpeed starts the cosine one step after its top.
    assert max(rates) == pytest.approx(top, rel=1e-5)
    assert rates.index(max(rates)) == pytest.approx(params["warmup_num_steps"], abs=1)
    assert rates[-1] == pytest.approx(params["cos_min_ratio"] * top, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_buckets_are_100_mb_and_stage_3_saves_whole_weights(name):
    stage, element_bytes = int(name[4]), ELEMENT_BYTES[name[6:]]
    zero = load(name)["zero_optimization"]
    buckets = {key: size * element_bytes for key, size in zero.items() if key.endswith("bucket_size")}
    assert set(buckets.values()) <= {100_000_000}
    assert ("reduce_bucket_size" in buckets) == (stage > 0)
    assert ("allgather_bucket_size" in buckets) == (stage in (1, 2))
    assert zero.get("overlap_comm", False) == (stage >= 2)
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (stage == 3)


def test_files_of_one_precision_differ_between_stages_in_zero_and_batch_only():
    for dtype in ELEMENT_BYTES:
        rest = []
        for stage in range(4):
            content = load(f"zero{stage}_{dtype}")
            for key in ("zero_optimization", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
                del content[key]
            rest.append(content)
        assert rest[0] == rest[1] == rest[2] == rest[3]


def test_readme_has_one_row_per_file_with_its_own_numbers():
    rows = re.findall(r"^\| \[(\w+)\.json\]\((\w+)\.json\) \| (.+?) \| (\d+) x (\d+) \|", readme(), flags=re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(NAMES)
    for name, link, weights, micro, accumulation in rows:
        content = load(name)
        assert link == name
        assert int(micro) == content["train_micro_batch_size_per_gpu"]
        assert int(accumulation) == content["gradient_accumulation_steps"]
        gib = 6738.42e6 * ELEMENT_BYTES[name[6:]] / 2**30
        assert weights == f"{gib:.1f} GiB" + (" / GPUs" if name[4] == "3" else "")


def test_the_command_in_readme_names_a_file_that_exists():
    (path,) = re.findall(
        r"^    deepspeed launch/train\.py --hift --deepspeed_config (\S+)$", readme(), flags=re.MULTILINE
    )
    assert (FOLDER.parent / path).is_file()


def readme() -> str:
    return (FOLDER / "README.md").read_text()
