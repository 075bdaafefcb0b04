"""launch/compare.py and launch/benchmark_memory.py as users start them, at tiny size, and how a cell ends.

All that starts ranks is slow; that a metered run meets its forecast test_meter.py holds on ranks that are up already.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

import hift_ds
from hift_ds.recipes.comparison import Cell
from launch import compare

pytestmark = pytest.mark.multi_rank
ROOT = Path(hift_ds.__file__).parents[1]
BIN = Path(sys.executable).parent
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
OF_A_LAUNCHER = re.compile(r"RANK|WORLD_SIZE|MASTER_|LOCAL_|OMPI_|PMIX_|PRTE_")
CELL = Cell("hift", 2, "bf16", 2, "AdamW", False, 32, 1, "bottom2up", 1)


def start(folder: Path, *command: object) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not OF_A_LAUNCHER.search(name)}
    environment = {**clean, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
              "zero_optimization": {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000}}  # fmt: skip
    (folder / "base.json").write_text(json.dumps(config))
    return folder


def compare_in(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return start(
        folder, sys.executable, ROOT / "launch/compare.py", "--stages", "2", "--precisions", "bf16", "--gpus", "2",
        "--seq_lens", "32", "--deepspeed_config", "base.json", "--output_dir", "out", *options, "--", "--random",
        "--model_name_or_path", "tiny.json", "--max_steps", "12",
    )  # fmt: skip


@pytest.fixture(scope="module")
def first(folder):
    return compare_in(folder)


@pytest.fixture(scope="module")
def second(folder, first):
    """The same with an optimizer that is refused; what is done stays."""
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "out/cells").glob("*2gpus_adamw*.json")}
    done = compare_in(folder, "--optimizers", "AdamW", "Muon", "--methods", "hift")
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "out/cells").glob("*2gpus_adamw*.json")}
    return done, before, after


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "out/results.csv").open()))


@pytest.mark.slow
def test_a_matrix_ends_in_rows_pictures_and_a_forecast_that_is_met(first, folder):
    assert first.returncode == 0, first.stderr
    assert max(map(len, first.stdout.splitlines())) <= 80 or "wrote" in first.stdout
    results = [json.loads(path.read_text()) for path in sorted((folder / "out/cells").glob("*k1.json"))]
    (hift,) = results
    assert hift["status"] == "ok" and hift["blocks"] == 4 and hift["ranks"] == 2 and len(hift["loss"]) == 12
    assert abs(hift["forecast"]["peak"] - hift["measured"]["allocated"]) <= 0.02 * hift["measured"]["allocated"]
    assert hift["step_ms"]["p50"] > 0 and hift["tokens_per_s"] > 0 and hift["timed_steps"] == 4  # of 12; 8 are metered
    assert hift["measured"]["reserved"] is None, "a CPU has no such allocator"
    assert {sample["block"] for record in hift["report"]["ranks"] for sample in record["samples"]} == {0, 1, 2, 3}
    for name in ("memory.png", "time.png", "results.md"):
        assert (folder / "out" / name).stat().st_size > 100


@pytest.mark.slow
def test_full_fine_tuning_and_hift_start_from_the_same_model_and_data(first, folder):
    losses = [json.loads(path.read_text())["loss"][0] for path in sorted((folder / "out/cells").glob("*s.json"))
              + sorted((folder / "out/cells").glob("*k1.json"))]  # fmt: skip
    assert len(losses) == 2 and losses[0] == losses[1]


@pytest.mark.slow
def test_finished_cells_are_kept_and_a_refused_one_is_a_row(second, folder):
    done, before, after = second
    assert done.returncode == 0, done.stderr
    assert before and before == after
    statuses = {row["optimizer"]: row["status"] for row in rows_of(folder)}
    assert statuses["AdamW"] == "ok"
    assert statuses["Muon"].startswith("refused: optimizer.type='Muon'")


@pytest.mark.slow
def test_mpirun_s_ranks_are_gathered_through_mpi_into_one_report(folder):
    done = start(
        folder, BIN / "mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable,
        ROOT / "launch/benchmark_memory.py", "--hift", "--random", "--model_name_or_path", "tiny.json", "--seq_len",
        "32", "--deepspeed_config", "base.json", "--max_steps", "8", "--results", "mpi.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = json.loads((folder / "mpi.json").read_text())["report"]["ranks"]
    assert [record["rank"] for record in ranks] == [0, 1]
    assert all(record["samples"] for record in ranks)


@pytest.mark.slow
def test_a_limit_on_gpu_memory_is_refused_on_a_cpu(folder):
    done = start(
        folder, sys.executable, ROOT / "launch/benchmark_memory.py", "--hift", "--random", "--model_name_or_path",
        "tiny.json", "--gpu_memory_limit", "22GiB",
    )  # fmt: skip
    assert done.returncode == 2
    assert "--gpu_memory_limit '22GiB': caps CUDA's allocator, and this run is on a CPU" in done.stderr


# How a cell can end, with a stand-in for the launcher.


def run_with(monkeypatch, tmp_path, script: str, timeout: float = 20) -> dict:
    monkeypatch.setattr(compare, "_launcher", lambda gpus: [sys.executable, "-c", script])
    arguments = ["compare.py", "--output_dir", str(tmp_path), "--cell_timeout", str(timeout)]
    monkeypatch.setattr(sys, "argv", arguments)
    return compare.run_cell(compare._arguments(), CELL, {"train_micro_batch_size_per_gpu": 1})


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("import sys; sys.exit(3)", "out of memory"),
        ("import sys; print('torch.OutOfMemoryError: CUDA out of memory.'); sys.exit(1)", "out of memory"),
        ("import sys; print('[rank 1] error: no such thing'); sys.exit(2)", "refused: no such thing"),
        ("import sys; print('[rank 1] error: a[rank 0] error: b'); sys.exit(1)", "refused: a"),
        ("import sys; print('step 1/9  x\\n[rank 0] error: ranks disagree'); sys.exit(1)", "failed: ranks disagree"),
        (
            "import sys; print('[rank1]: KeyError: 3\\nexits with return code 1'); sys.exit(1)",
            "failed (1): [rank1]: KeyError: 3",
        ),
        ("import os; print('the end', flush=True); os.kill(os.getpid(), 11)", "failed (-11): the end"),
    ],
)
def test_a_cell_without_a_result_says_why(monkeypatch, tmp_path, script, status):
    assert run_with(monkeypatch, tmp_path, script)["status"] == status


def test_a_cell_that_does_not_end_is_ended_with_all_that_it_started(monkeypatch, tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    began = time.monotonic()
    assert run_with(monkeypatch, tmp_path, script, timeout=1)["status"] == "no end within 1 s"
    assert time.monotonic() - began < 10
    time.sleep(3.5)
    assert not (tmp_path / "alive").exists()


def test_a_cell_is_ended_though_the_signal_came_while_it_was_waited_for():
    """The exception of a signal handler may leave `Popen.wait` with its lock taken."""
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    process._waitpid_lock.acquire()
    began = time.monotonic()
    compare._end(process)
    assert time.monotonic() - began < 5
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_comparison_that_is_ended_ends_what_it_started(tmp_path):
    """Its launcher is the one beside its Python: here one that makes a file first and another one later."""
    (tmp_path / "python").symlink_to(Path(sys.executable).resolve())
    (tmp_path / "deepspeed").write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nsleep 3\ntouch {tmp_path}/alive\n")
    (tmp_path / "deepspeed").chmod(0o755)
    process = subprocess.Popen(
        [tmp_path / "python", ROOT / "launch/compare.py", "--output_dir", tmp_path / "out"], stdout=subprocess.DEVNULL,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": sysconfig.get_paths()["purelib"]},
    )  # fmt: skip
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    time.sleep(3.5)
    assert not (tmp_path / "alive").exists()


def test_a_failed_cell_is_kept_until_it_is_asked_for_again(monkeypatch, tmp_path):
    fail = "import sys; sys.exit(3)"
    succeed = (
        "import json, sys; path = sys.argv[sys.argv.index('--results') + 1]; "
        "json.dump({'status': 'ok'}, open(path, 'w'))"
    )
    assert run_with(monkeypatch, tmp_path, fail)["status"] == "out of memory"
    assert run_with(monkeypatch, tmp_path, succeed)["status"] == "out of memory"
    original = compare._split
    monkeypatch.setattr(compare, "_split", lambda arguments: original([*arguments, "--retry_failed"]))
    assert run_with(monkeypatch, tmp_path, succeed)["status"] == "ok"
    monkeypatch.setattr(compare, "_split", original)
    assert run_with(monkeypatch, tmp_path, fail)["status"] == "ok"


def test_rounds_run_each_cell_again_and_a_cell_that_fails_once(monkeypatch, capsys, tmp_path):
    """The stand-in fails for full fine-tuning, else each run takes a second more a step than the one before."""
    script = (
        "import json, pathlib, sys; path = pathlib.Path(sys.argv[sys.argv.index('--results') + 1])\n"
        "log = path.parent / 'order'; log.open('a').write('hift ' if '--hift' in sys.argv else 'full ')\n"
        "if '--hift' not in sys.argv: sys.exit(3)\n"
        "from hift_ds.recipes.results import step_times\n"
        "roles = dict.fromkeys(('weights', 'gradients', 'state', 'activations', 'other'), 1)\n"
        "row = {'status': 'ok', 'measured': {'allocated': 5, 'how': 'by hand', **roles}, 'forecast': 'none'}\n"
        "json.dump(row | step_times([len(log.read_text().split())], 1, 12), path.open('w'))\n"
    )
    monkeypatch.setattr(compare, "_launcher", lambda gpus: [sys.executable, "-c", script])
    options = ["--stages", "2", "--precisions", "bf16", "--rounds", "3", "--methods", "hift", "full"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *options, "--output_dir", str(tmp_path / "out")])
    assert compare.main() == 0
    assert (tmp_path / "out/cells/order").read_text().split() == ["hift", "full", "hift", "hift"]
    hift, full = rows_of(tmp_path)
    assert (hift["rounds"], hift["timed_cycles"], hift["step_ms_p50"]) == ("3", "3", "3000.0")  # of 1, 3 and 4 s
    assert full["status"] == "out of memory"
    assert compare.main() == 0 and len((tmp_path / "out/cells/order").read_text().split()) == 4, "all are kept"


@pytest.mark.parametrize("rounds", ["0", "-1", "two"])
def test_rounds_are_counted_from_one(monkeypatch, capsys, rounds):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--rounds", rounds])
    with pytest.raises(SystemExit):
        compare._arguments()
    assert f"--rounds: '{rounds}': must be a whole number from 1" in capsys.readouterr().err


def test_options_that_compare_sets_itself_are_refused_after_the_dashes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--output_dir", str(tmp_path), "--", "--hift"])
    assert compare.main() == 2
    assert "--hift after --: compare.py sets it for each cell" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_of_saves_has_both_ways_and_leaves_no_checkpoint(folder):
    done = start(
        folder, BIN / "torchrun", "--standalone", "--nproc_per_node", "2", ROOT / "launch/benchmark_save.py", "--hift",
        "--random", "--model_name_or_path", "tiny.json", "--seq_len", "32", "--deepspeed_config", "base.json",
        "--output_dir", "saves", "--results", "save.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads((folder / "save.json").read_text())
    assert len(row["rounds"]) == 3 and min(row["waits_s"], row["stalls_s"], row["step_meanwhile_s"]) > 0
    assert row["bytes"] > 4 * 3 * 100_000 and not list((folder / "saves").iterdir())
