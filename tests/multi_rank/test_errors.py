"""Bad input: one clear sentence on every rank, an exit code that is not 0, and no hang."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hift_testing import error_cases as cases

pytestmark = pytest.mark.multi_rank

TESTS = Path(cases.__file__).parents[1]
# case -> how the error begins, and words it must hold
EXPECTED = {
    "typo": ("ValueError: hift.layer_per_block=2", "did you mean 'layers_per_block'?"),
    "type": ("TypeError: hift.layers_per_block='2'", "whole number"),
    "value": ("ValueError: hift.order='bottom_up'", "'bottom2up', 'top2down', 'random'"),
    "enabled": ("ValueError: hift.enabled: missing", '{"enabled": true}'),
    "moments": ("ValueError: hift.state.moments='int8': adafactor keeps them in 'fp32'", "use one of these"),
    "master": ("ValueError: hift.state.master='split16': needs bf16 model weights", "use 'fp32'"),
    "on host and device": ("ValueError: hift.state.residency='device': offload_optimizer.device", "remove one"),
    "compact on host": ("ValueError: zero_optimization.offload_optimizer.device='cpu': updates on", "or hift.state"),
    "kernel on host": ("ValueError: zero_optimization.offload_optimizer.device='cpu'", "hift.kernel='triton'"),
    "compact in torch": ("ValueError: hift.kernel='torch': updates masters and moments in fp32", "use null or"),
    "ring without streams": ("ValueError: hift.state.ring_bytes=1048576", "leave it out"),
    "blocks and layers": ("ValueError: hift.layers_per_block=2", "must be 1 or left out"),
    "letters": ("ValueError: HiFT: unknown key", 'write it "hift"'),
    "scheduler": ("ValueError: scheduler.type='Warmup'", "WarmupLR"),
    "scheduler key": ("ValueError: scheduler.params={'steps': 3}", "correct them"),
    "batch": ("ValueError: train_batch_size=7", "2 ranks"),
    "micro batch": ("ValueError: train_micro_batch_size_per_gpu=0", "1 or more"),
    "two precisions": ("ValueError: DeepSpeed refuses the config", "fp16"),
    "stage": ("ValueError: DeepSpeed refuses stage=4", "correct it"),
    "clip": ("ValueError: gradient_clipping='1'", "a number"),
    "nothing to train": ("ValueError: No parameter of the model has requires_grad=True", "set it"),
    "two blocks": ("ValueError: hift.blocks[0]", "model.layers.1."),
    "no block": ("ValueError: hift.blocks: 2 trainable parameters are in no block", "'lm_head.weight'"),
    "no match": ("ValueError: hift.frozen='layer_norm': matches no trainable parameter", "the closest are"),
    "bad regex": ("ValueError: hift.always_active='layers.(0': is not a regex", "correct it"),
    "all always active": ("ValueError: hift.always_active=", "nothing is left to rotate"),
    "all frozen": ("ValueError: hift.frozen=", "leave at least one to train"),
    "lamb": ("ValueError: optimizer.type='Lamb': HiFT has no rule", "AdamW, Adam, SGD, Adagrad, Adafactor, Lion"),
    "transformers": ("TypeError: optimizer of class transformers.optimization.Adafactor", "torch.optim.Adafactor"),
    "subclass": ("TypeError: optimizer of class hift_testing.error_cases.OwnAdamW", "pass AdamW itself"),
    "no optimizer": ("ValueError: optimizer: missing", '"optimizer"'),
    "optimizer key": ("ValueError: optimizer.params.learning_rate=0.001", "lr"),
    "zenflow": ("ValueError: zero_optimization.zenflow=", "not supported with HiFT"),
    "nvme": ("ValueError: zero_optimization.offload_optimizer.device='nvme'", "not supported with HiFT"),
    "zero++": ("ValueError: zero_optimization.zero_quantized_weights=True", "not supported with HiFT"),
    "auto": ("ValueError: gradient_clipping='auto'", "put a value"),
    "mpu": ("ValueError: mpu=object", "leave mpu out"),
    "no model": ("TypeError: model=NoneType", "torch.nn.Module"),
    "half a param group": ("ValueError: model_parameters: 34 trainable parameters are in no param group", "frozen"),
}
NOTHING_TO_TRAIN = EXPECTED["nothing to train"][0]


def test_bad_input_is_refused_with_the_same_sentence_on_every_rank(two_ranks):
    results = two_ranks.run(cases.refused, list(EXPECTED))
    for found in results:
        assert found == results[0]
        for name, (start, words) in EXPECTED.items():
            assert found[name].startswith(start), (name, found[name])
            assert words in found[name], (name, found[name])
        assert found["good"] == "1"


# What is refused of a model or an argument, which a plan does not see.
NOT_IN_A_PLAN = {"nothing to train", "transformers", "subclass", "mpu", "no model", "half a param group"}


def test_whatever_initialize_refuses_a_plan_refuses_with_the_same_sentence(two_ranks, tmp_path):
    names = [name for name in EXPECTED if name not in NOT_IN_A_PLAN]
    refused = two_ranks.run(cases.refused, names)[0]
    planned = two_ranks.run(cases.refused_by_plan, names, str(tmp_path))[0]
    for name in names:
        sentence = refused[name].partition(": ")[2]
        assert planned[name] == f"exit 2: hift-ds plan: error: {sentence}", name


def test_what_only_one_rank_finds_is_raised_on_all(two_ranks):
    first, second = two_ranks.run(cases.refused, ["nothing to train on rank 1", "other model on rank 1"])
    assert second["nothing to train on rank 1"].startswith(NOTHING_TO_TRAIN)
    assert first["nothing to train on rank 1"].startswith(f"RuntimeError: rank 1 failed: {NOTHING_TO_TRAIN}")
    for found in (first, second):
        assert found["other model on rank 1"].startswith("RuntimeError: hift section or model: ranks 0 and 1 differ")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(launcher: list[str], case: str, folder: Path) -> tuple[int, list[str], str]:
    """Exit code, what each rank met, and all output of a two-rank program."""
    of_a_launcher = re.compile(r"RANK|WORLD_SIZE|MASTER_|LOCAL_|GROUP_|TORCHELASTIC|OMPI_|PMIX_")
    clean = {name: value for name, value in os.environ.items() if not of_a_launcher.match(name)}
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**clean, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [*launcher, "hift_testing.error_cases", case, str(folder)], cwd=folder, env=environment, timeout=150,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    reports = [folder / f"rank{rank}.txt" for rank in range(2)]
    return done.returncode, [path.read_text() if path.exists() else "" for path in reports], done.stdout


@pytest.mark.slow
def test_a_torchrun_program_ends_with_one_ranks_error_on_every_rank(tmp_path):
    launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m"]
    code, reports, output = launched(launcher, "nothing to train on rank 1", tmp_path)
    assert code != 0
    assert [NOTHING_TO_TRAIN in report for report in reports] == [True, True], output
    assert NOTHING_TO_TRAIN in output


@pytest.mark.slow
def test_a_deepspeed_program_ends_with_the_error_on_every_rank(tmp_path):
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "--module"]
    code, reports, output = launched(launcher, "lamb", tmp_path)
    assert code != 0
    assert [report.startswith(EXPECTED["lamb"][0]) for report in reports] == [True, True], output
    assert EXPECTED["lamb"][0] in output
