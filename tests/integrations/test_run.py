"""`python -m hift_ds.run`: a script that is not changed, under every launcher."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hift_testing.selection import slow
from hift_testing.training import ds_config

ROOT = Path(__file__).parents[2]
# What a user has: DeepSpeed's own call, and nothing of hift_ds.
SCRIPT = """
import argparse, json, os, pickle, sys
import torch
import deepspeed
from deepspeed import initialize
from beside import VOCABULARY  # the script's folder is on sys.path

class Ours:
    pass

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--out")
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args()
    assert type(pickle.loads(pickle.dumps(Ours()))) is Ours  # __main__ is this script
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(3)))
    engine, *_ = initialize(args=args, model=model)
    for step in range(4):
        loss = engine(torch.ones(2, 8)).square().mean()
        engine.backward(loss)
        engine.step()
    if engine.global_rank == 0:
        facts = {"engine": type(engine).__name__, "cycle": engine.hift.cycle, "argv": sys.argv, "file": __file__,
                 "name": __name__, "path": sys.path[0], "ranks": engine.dp_world_size, "local_rank": args.local_rank}
        open(args.out, "w").write(json.dumps(facts))

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("VOCABULARY = 1\n")
    config = ds_config(0, hift={})
    config["optimizer"]["type"] = "HiFT_AdamW"
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "train.py"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(command, folder, **environment):
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    own |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "DS_ACCELERATOR": "cpu", "MASTER_PORT": free_port(),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **environment}  # fmt: skip
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=180)


def facts_of(command, script, **environment):
    out = script.parent / "facts.json"
    options = ["--deepspeed_config", str(script.parent / "config.json"), "--out", str(out)]
    elsewhere = script.parent / "elsewhere"
    elsewhere.mkdir()
    found = run([*command, *options], elsewhere, **environment)
    assert found.returncode == 0, found.stderr
    assert "HiFT trains this Sequential" in found.stderr + found.stdout
    facts = json.loads(out.read_text())
    assert (facts["engine"], facts["cycle"], facts["name"]) == ("HiFTEngine", 1, "__main__")
    assert facts["argv"][-len(options) :] == options
    return facts


def test_a_script_runs_as_python_would_run_it(script):
    facts = facts_of([sys.executable, "-m", "hift_ds.run", str(script)], script)
    assert facts["file"] == facts["argv"][0] == str(script)
    assert facts["path"] == str(script.parent)
    assert len(facts["argv"]) == 5


MAIN = """
import atexit, multiprocessing, os, pickle, sys

class Ours:
    pass

def made(_):
    return Ours()

if __name__ == "__main__":
    assert os.path.isabs(__file__) and __spec__ is None and __package__ is None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert type(pool.map(made, [0])[0]) is Ours
    atexit.register(lambda: print(type(pickle.loads(pickle.dumps(Ours()))) is Ours))
"""


@pytest.mark.parametrize("target", [("main.py",), slow(("-m", "main")), slow(("folder",))])
def test_its_classes_are_those_of_main_in_spawned_processes_and_while_python_ends(tmp_path, target):
    of_a_script = " and __spec__ is None and __package__ is None"
    (tmp_path / "main.py").write_text(MAIN if target[0] == "main.py" else MAIN.replace(of_a_script, ""))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text("import os\nassert os.path.isabs(__file__)\nprint(True)\n")
    found = run([sys.executable, "-m", "hift_ds.run", *target], tmp_path)
    assert (found.returncode, found.stdout) == (0, "True\n"), found.stderr


@pytest.mark.slow
def test_a_module_runs_as_python_would_run_it(script):
    package = script.parent / "elsewhere" / "ours"  # in the working directory
    command = [sys.executable, "-m", "hift_ds.run", "-m", "ours.train"]
    (script.parent / "elsewhere").mkdir()
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(script, package / "train.py")
    (script.parent / "elsewhere" / "beside.py").write_text("VOCABULARY = 1\n")
    (script.parent / "elsewhere").rename(script.parent / "work")
    (script.parent / "elsewhere").mkdir()
    out = script.parent / "facts.json"
    options = ["--deepspeed_config", str(script.parent / "config.json"), "--out", str(out)]
    found = run([*command, *options], script.parent / "work")
    assert found.returncode == 0, found.stderr
    facts = json.loads(out.read_text())
    assert facts["file"] == facts["argv"][0] == str(script.parent / "work" / "ours" / "train.py")


LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", "PORT", "-m", "hift_ds.run"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--module", "hift_ds.run"],
    "accelerate": ["accelerate", "launch", "--config_file", "../accelerate.yaml", "--main_process_port", "PORT", "-m",
                   "hift_ds.run"],
}  # fmt: skip
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {deepspeed_config_file: ../config.json, zero3_init_flag: false}
machine_rank: 0
num_machines: 1
num_processes: 2
"""


@pytest.mark.parametrize("launcher", [slow("deepspeed"), slow("torchrun"), slow("accelerate")])
def test_a_script_runs_on_two_ranks_under_a_launcher(script, launcher):
    (script.parent / "accelerate.yaml").write_text(ACCELERATE)
    command = [free_port() if word == "PORT" else word for word in LAUNCHERS[launcher]]
    facts = facts_of([*command, str(script)], script, LOCAL_SIZE="2")
    assert facts["ranks"] == 2
    if launcher == "deepspeed":
        assert facts["argv"][1] == "--local_rank=0" and facts["local_rank"] == 0


def test_help_and_what_is_not_there_are_said_in_a_sentence(tmp_path):
    found = run([sys.executable, "-m", "hift_ds.run", "--help"], tmp_path)
    assert found.returncode == 0 and "torchrun" in found.stdout and max(map(len, found.stdout.splitlines())) <= 80
    found = run([sys.executable, "-m", "hift_ds.run", "nowhere.py"], tmp_path)
    assert found.returncode == 2 and found.stderr == (
        "hift_ds.run: 'nowhere.py': no such script; name a file, or a module after -m\n"
    )
    found = run([sys.executable, "-m", "hift_ds.run"], tmp_path)
    assert found.returncode == 2 and found.stderr.startswith("usage: ")


@pytest.mark.slow
def test_the_exit_code_and_an_error_are_the_script_s(tmp_path):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(7)\n")
    (tmp_path / "fails.py").write_text("raise KeyError('here')\n")
    assert run([sys.executable, "-m", "hift_ds.run", "leaves.py"], tmp_path).returncode == 7
    found = run([sys.executable, "-m", "hift_ds.run", "fails.py"], tmp_path)
    assert found.returncode == 1 and found.stderr.rstrip().endswith("KeyError: 'here'")
