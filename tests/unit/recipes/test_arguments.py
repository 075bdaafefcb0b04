"""The command line and the config that comes of it: what overrides what, and what is refused in which words."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hift_ds
from hift_ds.config.batch import ACCUMULATION, MICRO, TRAIN, batch_sizes
from hift_ds.config.keys import HiFTConfig, StateConfig
from hift_ds.config.kinds import declared
from hift_ds.recipes.arguments import add_arguments, build_ds_config
from hift_ds.recipes.setup import prepare_process

ROOT = Path(hift_ds.__file__).parents[1]
FILE = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 96, "warmup_num_steps": 8}},
    "zero_optimization": {"stage": 2},
    "hift": {"enabled": False, "layers_per_block": 4, "seed": 7},
}


@pytest.fixture
def config_of(tmp_path):
    """Writes a config file and builds the config of a command line with it."""

    def build(*options: str, content: object = None, max_steps: int | None = None, **changes: object) -> dict:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**FILE, **changes} if content is None else content))
        return build_ds_config(parse("--deepspeed_config", str(path), *options), max_steps)

    return build


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser, ROOT / "launch" / "demo.json")
    return parser.parse_args(options)


# The "hift" section.


def test_without_hift_the_file_is_taken_but_for_its_hift_section(config_of):
    assert config_of() == {key: value for key, value in FILE.items() if key != "hift"}


def test_hift_switches_the_section_on_and_keeps_its_other_keys(config_of):
    assert config_of("--hift")["hift"] == {"enabled": True, "layers_per_block": 4, "seed": 7}


@pytest.mark.parametrize("section", [None, {}], ids=["null", "empty"])
def test_hift_needs_no_section_in_the_file(config_of, section):
    assert config_of("--hift", hift=section)["hift"] == {"enabled": True}


@pytest.mark.parametrize(
    ("option", "values", "expected"),
    [
        ("layers_per_block", ["2"], 2),
        ("order", ["random"], "random"),
        ("seed", ["3"], 3),
        ("steps_per_block", ["5"], 5),
        ("lr_update", ["paper"], "paper"),
        ("inactive_state", ["reset"], "reset"),
        ("kernel", ["triton"], "triton"),
        ("kernel", ["null"], None),
        ("seq_len", ["128"], 128),
        ("no_gradient", ["skip"], "skip"),
        ("frozen", ["embed", "norm$"], ["embed", "norm$"]),
        ("always_active", ["head"], ["head"]),
    ],
)
def test_each_option_overrides_its_key_of_the_section(config_of, option, values, expected):
    section = config_of("--hift", f"--hift_{option}", *values)["hift"]
    assert section == {"enabled": True, "layers_per_block": 4, "seed": 7, option: expected}
    read = getattr(HiFTConfig.from_ds_config({"hift": section}), option)
    assert read == (tuple(expected) if isinstance(expected, list) else expected)


def test_blocks_state_and_null_have_options_as_json_or_by_key(config_of):
    section = config_of(
        "--hift", "--hift_blocks", '[["embed"], ["layers", "head"]]', "--hift_layers_per_block", "null",
        "--hift_state_moments", "int8", "--hift_state_pin_memory", "false", hift={"state": {"moments": "bf16"}},
    )["hift"]  # fmt: skip
    assert section.pop("seq_len") == 512, "of --seq_len"
    assert section == {
        "enabled": True, "blocks": [["embed"], ["layers", "head"]], "layers_per_block": None,
        "state": {"moments": "int8", "pin_memory": False},
    }  # fmt: skip


def test_blocks_of_the_command_line_take_the_place_of_the_file_s_layers_per_block(config_of):
    section = config_of("--hift", "--hift_blocks", '[["layers"], ["embed"]]')["hift"]
    assert section == {"enabled": True, "seed": 7, "blocks": [["layers"], ["embed"]]}


def test_every_key_has_an_option_and_help_says_what_it_does(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for part in (*declared(HiFTConfig), *declared(StateConfig)):
        if part.name not in ("enabled", "state"):
            prefix = "--hift_state_" if part in declared(StateConfig) else "--hift_"
            assert prefix + part.name in shown


def test_option_without_hift_is_refused_by_name(config_of):
    with pytest.raises(ValueError, match=r"^--hift_order: has no effect without --hift; add --hift$"):
        config_of("--hift_order", "random")


def test_section_that_is_no_object_is_refused(config_of):
    with pytest.raises(TypeError, match=r"^hift=\[1\]: must be an object such as"):
        config_of("--hift", hift=[1])


def test_typo_in_the_section_reaches_the_check_that_names_it(config_of):
    config = config_of("--hift", hift={"layer_per_block": 1})
    with pytest.raises(ValueError, match=r"hift\.layer_per_block=1: unknown key; did you mean 'layers_per_block'\?"):
        HiFTConfig.from_ds_config(config)


# The file.


@pytest.mark.parametrize("name", ["missing.json", "."], ids=["missing", "folder"])
def test_config_that_is_no_file_is_refused_with_its_name(name, tmp_path):
    path = str(tmp_path / name)
    with pytest.raises(ValueError, match=rf"^--deepspeed_config {re.escape(repr(path))}: no such file"):
        build_ds_config(parse("--deepspeed_config", path))


def test_config_that_is_not_json_is_refused_with_the_place(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"config\.json': not JSON \(.*line 1 column"):
        build_ds_config(parse("--deepspeed_config", str(path)))


def test_config_that_is_a_list_is_refused(config_of):
    with pytest.raises(ValueError, match=r"must be a JSON object, is a list"):
        config_of(content=[1])


def test_demo_config_is_the_default_and_trains_one_step_as_well_as_many():
    for max_steps in (1, 5, 500):
        params = build_ds_config(parse("--hift"), max_steps)["scheduler"]["params"]
        assert params["total_num_steps"] == max(2, max_steps)
        assert params["warmup_num_steps"] == {1: 1, 5: 1, 500: 8}[max_steps]


# Rates and schedule.


def test_schedule_of_the_file_stays_without_max_steps(config_of):
    assert config_of()["scheduler"] == FILE["scheduler"]


def test_lr_overrides_the_optimizer_and_nothing_else_of_it(config_of):
    assert config_of("--lr", "0.5")["optimizer"] == {"type": "AdamW", "params": {"lr": 0.5, "weight_decay": 0.1}}


def test_lr_without_an_optimizer_in_the_file_means_adamw(config_of):
    assert config_of("--lr", "0.5", content={MICRO: 1})["optimizer"] == {"type": "AdamW", "params": {"lr": 0.5}}


def test_lr_overrides_the_height_of_a_schedule_that_has_its_own(config_of):
    params = {"warmup_max_lr": 1e-4, "warmup_num_steps": 8}
    config = config_of("--lr", "0.5", scheduler={"type": "WarmupLR", "params": params})
    assert config["scheduler"]["params"] == {"warmup_max_lr": 0.5, "warmup_num_steps": 8}


@pytest.mark.parametrize("scheduler", ["OneCycle", "LRRangeTest"])
def test_lr_that_a_schedule_would_ignore_is_refused(config_of, scheduler):
    with pytest.raises(ValueError, match=rf"--lr 0\.5: has no effect on scheduler\.type='{scheduler}'"):
        config_of("--lr", "0.5", scheduler={"type": scheduler, "params": {}})


def test_null_sections_are_absent_sections(config_of):
    assert config_of("--lr", "0.5", scheduler=None, max_steps=5)["scheduler"] is None


# Batch sizes.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--micro_batch", "2"], (2, 4)),
        (["--accumulation", "4"], (2, 4)),
        (["--micro_batch", "2", "--accumulation", "8"], (2, 8)),
        ([], (8, 1)),
    ],
)
def test_one_size_given_keeps_the_batch_of_the_file_and_both_change_it(config_of, options, expected):
    config = config_of(*options, content={MICRO: 8, ACCUMULATION: 1, TRAIN: 16})
    assert batch_sizes(config, 2) == expected


def test_sizes_given_override_a_file_without_a_whole_batch(config_of):
    config = config_of("--micro_batch", "2", "--accumulation", "3")
    assert batch_sizes(config, 2) == (2, 3)


# The rest of the command line, and the process.


def test_tensorboard_writes_below_output_dir(config_of):
    section = config_of("--tensorboard", "--output_dir", "out")["tensorboard"]
    assert section == {"enabled": True, "output_path": "out", "job_name": "tensorboard"}
    assert "tensorboard" not in config_of()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_steps", "0"], "argument --max_steps: '0': must be a whole number from 1"),
        (["--save_every", "-1"], "argument --save_every: '-1': must be a whole number from 1"),
        (["--hift_order", "up"], "argument --hift_order: hift.order='up': must be one of"),
        (["--hift_oder", "random"], "unrecognized arguments: --hift_oder"),
    ],
)
def test_bad_option_ends_with_usage_and_its_name(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_options_are_read_before_torch_is_loaded():
    """The number of threads is read when torch loads; and nobody waits for a typo to be found."""
    names = "hift_ds.recipes.setup, hift_ds.recipes.arguments"
    code = f"import sys, {names}; print({{'torch', 'deepspeed'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_ranks_of_a_machine_share_its_cores(variable, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("DS_LOG_LEVEL", "info")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv(variable, "4")
    prepare_process(verbose=True)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    prepare_process(verbose=True)
    assert os.environ["OMP_NUM_THREADS"] == "5"
