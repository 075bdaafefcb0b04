"""README says what is true: its example runs, its tables are the code's."""

import json
import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

from hift_ds.config.ds_keys import markdown_table
from hift_ds.config.keys import HiFTConfig, StateConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _table(header: str) -> dict[str, str]:
    """Second column of a table by its first (in backquotes)."""
    body = README.split(header, 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", body, re.MULTILINE)
    return dict(rows)


def test_quickstart_runs_on_a_cpu_and_rotates_through_every_block_twice(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    script = tmp_path / "quickstart.py"
    script.write_text(code + "\nassert engine.hift.cycle == 2 and engine.hift.active_block == 0\nprint('done')\n")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.rstrip().endswith("done") and "blocks, cycle 0" in run.stdout


def test_hift_table_lists_every_key_with_its_default():
    documented = _table("| key | default | meaning |\n")
    defaults = {
        field.name: "(required)" if field.default is MISSING else f"`{json.dumps(field.default)}`"
        for field in fields(HiFTConfig)
        if field.name != "state"
    }
    assert documented.pop("state") == "`{}`"
    assert {key: value.replace("`", "") for key, value in documented.items()} == {
        key: value.replace("`", "") for key, value in defaults.items()
    }


def test_state_table_lists_every_key_with_its_default():
    documented = _table("| key of `state` | default | meaning |\n")
    defaults = {field.name: json.dumps(field.default) for field in fields(StateConfig)}
    assert {key: value.replace("`", "") for key, value in documented.items()} == defaults


def test_deepspeed_key_table_is_the_one_that_the_checks_use():
    assert markdown_table().strip() in README


def test_numbers_of_the_sample_data_are_those_of_the_files():
    rows = (ROOT / "hift_ds/recipes/data/hift_faq_train.jsonl").read_text(encoding="utf-8").splitlines()
    assert f"{len(rows)}\nquestions and answers" in README


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (ROOT / target).exists(), target
