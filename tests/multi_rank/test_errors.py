"""Bad input: one clear sentence on every rank, an exit code that is not 0, and no hang.

Also a script, `test_errors.py NAME FOLDER`: the case NAME as a user's program meets it.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from deepspeed import comm as dist
from hift_testing.messages import error_of
from hift_testing.training import ds_config, engine_of, run_steps, small_llama

import hift_ds
from hift_ds import cli
from hift_ds.zero import states

pytestmark = pytest.mark.multi_rank


class OwnAdamW(torch.optim.AdamW):
    """A subclass, which may do anything."""


def client(make: Any) -> Any:
    model, config, _ = without_optimizer()
    return model, config, {"optimizer": make(model.parameters())}


def given(hift: dict[str, Any] | None = None, stage: int = 2, **keys: Any) -> Any:
    return small_llama(), ds_config(stage, "fp32", hift or {}, **keys), {}


def frozen(on_rank: int | None = None) -> Any:
    model = small_llama()
    if on_rank in (None, dist.get_rank()):
        model.requires_grad_(False)
    return model, ds_config(1, "fp32", {}), {}


def other_model_on_rank_1() -> Any:
    return small_llama(layers=4 + dist.get_rank()), ds_config(1, "fp32", {}), {}


def without_optimizer() -> Any:
    model, config, _ = given()
    del config["optimizer"]
    return model, config, {}


def zero(**keys: Any) -> Any:
    return given(zero_optimization=keys)


def half_a_param_group() -> Any:
    model, config, _ = given()
    return model, config, {"model_parameters": list(model.parameters())[:5]}


# name -> (what makes model, config and further arguments of initialize, how the error begins, words that it must hold)
BAD: dict[str, tuple[Any, str, str]] = {
    "typo": (lambda: given({"layer_per_block": 2}),
             "ValueError: hift.layer_per_block=2", "did you mean 'layers_per_block'?"),
    "type": (lambda: given({"layers_per_block": "2"}), "TypeError: hift.layers_per_block='2'", "whole number"),
    "value": (lambda: given({"order": "bottom_up"}),
              "ValueError: hift.order='bottom_up'", "'bottom2up', 'top2down', 'random'"),
    "enabled": (lambda: (small_llama(), {**ds_config(1), "hift": {"order": "random"}}, {}),
                "ValueError: hift.enabled: missing", '{"enabled": true}'),
    "moments": (lambda: given({"state": {"moments": "int8"}}, optimizer={"type": "Adafactor", "params": {"lr": 1e-3}}),
                "ValueError: hift.state.moments='int8': adafactor keeps them in 'fp32'", "use one of these"),
    "master": (lambda: given({"state": {"master": "split16"}}),
               "ValueError: hift.state.master='split16': needs bf16 model weights", "use 'fp32'"),
    "on host and device": (lambda: given({"state": {"residency": "device"}},
                                         zero_optimization={"stage": 1, "offload_optimizer": {"device": "cpu"}}),
                           "ValueError: hift.state.residency='device': offload_optimizer.device", "remove one"),
    "compact on host": (lambda: given({"state": {"master": "split16", "moments": "int8"}}, bf16={"enabled": True},
                                      zero_optimization={"stage": 1, "offload_optimizer": {"device": "cpu"}}),
                        "ValueError: zero_optimization.offload_optimizer.device='cpu': updates on", "or hift.state"),
    "kernel on host": (lambda: given({"kernel": "triton"}, zero_optimization={"cpu_offload": True, "stage": 2}),
                       "ValueError: zero_optimization.offload_optimizer.device='cpu'", "hift.kernel='triton'"),
    "compact in torch": (lambda: given({"kernel": "torch", "state": {"moments": "bf16"}}),
                         "ValueError: hift.kernel='torch': updates masters and moments in fp32", "use null or"),
    "ring without streams": (lambda: given({"state": {"residency": "device", "ring_bytes": 1 << 20}}),
                             "ValueError: hift.state.ring_bytes=1048576", "leave it out"),
    "blocks and layers": (lambda: given({"layers_per_block": 2, "blocks": [["."]]}),
                          "ValueError: hift.layers_per_block=2", "must be 1 or left out"),
    "letters": (lambda: (small_llama(), {**ds_config(1), "HiFT": {"enabled": True}, "hift": {"enabled": True}}, {}),
                "ValueError: HiFT: unknown key", 'write it "hift"'),
    "scheduler": (lambda: given(scheduler={"type": "Warmup", "params": {}}),
                  "ValueError: scheduler.type='Warmup'", "WarmupLR"),
    "scheduler key": (lambda: given(scheduler={"type": "WarmupLR", "params": {"steps": 3}}),
                      "ValueError: scheduler.params={'steps': 3}", "correct them"),
    "null section": (lambda: given(scheduler=None),
                     "ValueError: scheduler=null: DeepSpeed reads a section", "leave the key"),
    "sums of integers": (lambda: given(data_types={"grad_accum_dtype": "int8"}),
                         "ValueError: data_types.grad_accum_dtype=torch.int8", "fp32, bf16 or fp16"),
    "batch": (lambda: given(train_batch_size=7), "ValueError: train_batch_size=7", "2 ranks"),
    "micro batch": (lambda: given(train_micro_batch_size_per_gpu=0),
                    "ValueError: train_micro_batch_size_per_gpu=0", "1 or more"),
    "two precisions": (lambda: given(bf16={"enabled": True}, fp16={"enabled": True}),
                       "ValueError: DeepSpeed refuses the config", "fp16"),
    "stage": (lambda: zero(stage=4), "ValueError: DeepSpeed refuses stage=4", "correct it"),
    "clip": (lambda: given(gradient_clipping="1"), "ValueError: gradient_clipping='1'", "a number"),
    "nothing to train": (frozen, "ValueError: No parameter of the model has requires_grad=True", "set it"),
    "two blocks": (lambda: given({"blocks": [["embed", r"layers\.[01]"], [r"layers\.[123]", "norm", "head"]]}),
                   "ValueError: hift.blocks[0]", "model.layers.1."),
    "no block": (lambda: given({"blocks": [["embed"], ["layers"]]}),
                 "ValueError: hift.blocks: 2 trainable parameters are in no block", "'lm_head.weight'"),
    "no match": (lambda: given({"frozen": ["layer_norm"]}),
                 "ValueError: hift.frozen='layer_norm': matches no trainable parameter", "the closest are"),
    "bad regex": (lambda: given({"always_active": ["layers.(0"]}),
                  "ValueError: hift.always_active='layers.(0': is not a regex", "correct it"),
    "all always active": (lambda: given({"always_active": ["."]}),
                          "ValueError: hift.always_active=", "nothing is left to rotate"),
    "all frozen": (lambda: given({"frozen": ["."]}), "ValueError: hift.frozen=", "leave at least one to train"),
    "lamb": (lambda: given(optimizer={"type": "Lamb", "params": {"lr": 1e-3}}),
             "ValueError: optimizer.type='Lamb': HiFT has no rule", "AdamW, Adam, SGD, Adagrad, Adafactor, Lion"),
    "transformers": (lambda: client(lambda params: transformers.Adafactor(params, lr=1e-3, relative_step=False)),
                     "TypeError: optimizer of class transformers.optimization.Adafactor", "torch.optim.Adafactor"),
    "subclass": (lambda: client(OwnAdamW),
                 f"TypeError: optimizer of class {__name__}.OwnAdamW", "pass AdamW itself"),
    "no optimizer": (without_optimizer, "ValueError: optimizer: missing", '"optimizer"'),
    "optimizer key": (lambda: given(optimizer={"type": "AdamW", "params": {"learning_rate": 1e-3}}),
                      "ValueError: optimizer.params.learning_rate=0.001", "lr"),
    "zenflow": (lambda: zero(zenflow={"topk_ratio": 0.1}),
                "ValueError: zero_optimization.zenflow=", "not supported with HiFT"),
    "nvme": (lambda: zero(offload_optimizer={"device": "nvme", "nvme_path": "x"}),
             "ValueError: zero_optimization.offload_optimizer.device='nvme'", "not supported with HiFT"),
    "zero++": (lambda: zero(zero_quantized_weights=True),
               "ValueError: zero_optimization.zero_quantized_weights=True", "not supported with HiFT"),
    "auto": (lambda: given(gradient_clipping="auto"), "ValueError: gradient_clipping='auto'", "put a value"),
    "mpu": (lambda: (*given()[:2], {"mpu": object()}), "ValueError: mpu=object", "leave mpu out"),
    "no model": (lambda: (None, ds_config(1, "fp32", {}), {}), "TypeError: model=NoneType", "torch.nn.Module"),
    "half a param group": (half_a_param_group,
                           "ValueError: model_parameters: 34 trainable parameters are in no param group", "frozen"),
}  # fmt: skip
ON_RANK_1 = {"nothing to train on rank 1": lambda: frozen(on_rank=1), "other model on rank 1": other_model_on_rank_1}
NOTHING_TO_TRAIN = BAD["nothing to train"][1]


def made(name: str) -> Any:
    """Model, config and further arguments of a case, on this rank."""
    return (ON_RANK_1[name] if name in ON_RANK_1 else BAD[name][0])()


def refused(names: list[str]) -> dict[str, str]:
    """`Type: message` of each case; then a good engine trains, to show that nothing is left broken."""
    found = {}
    for name in names:
        model, config, arguments = made(name)
        found[name] = error_of(lambda m=model, c=config, a=arguments: hift_ds.initialize(model=m, config=c, **a))
    engine = engine_of(ds_config(2, "fp32", {}))
    run_steps(engine, 1)
    assert engine.hift.active_block == 1
    return found


def test_bad_input_is_refused_with_the_same_sentence_on_every_rank(two_ranks):
    found, other = two_ranks.run(refused, list(BAD))
    assert found == other
    for name, (_, start, words) in BAD.items():
        assert found[name].startswith(start), (name, found[name])
        assert words in found[name], (name, found[name])


# What is refused of a model or an argument, which a plan does not see; "auto" it answers, as the Trainer would.
NOT_IN_A_PLAN = {"nothing to train", "transformers", "subclass", "mpu", "no model", "half a param group", "auto"}


def refused_by_plan(names: list[str], folder: str) -> None:
    """What `hift-ds plan --deepspeed_config` says of the same models and configs, on rank 0."""
    for name, refusal in refused(names).items():
        if dist.get_rank() == 0:
            model, config, _ = made(name)
            model.config.save_pretrained(folder)
            path = Path(folder, "ds_config.json")
            path.write_text(json.dumps(config))
            said = io.StringIO()
            with redirect_stderr(said), redirect_stdout(io.StringIO()):
                options = ["--model", folder, "--deepspeed_config", str(path), "--gpus", "2", "--seq", "8"]
                assert cli.main(["plan", *options]) == 2, name
            assert said.getvalue().strip() == f"hift-ds plan: error: {refusal.partition(': ')[2]}", name


def test_whatever_initialize_refuses_a_plan_refuses_with_the_same_sentence(two_ranks, tmp_path):
    two_ranks.run(refused_by_plan, [name for name in BAD if name not in NOT_IN_A_PLAN], str(tmp_path))


def test_what_only_one_rank_finds_is_raised_on_all(two_ranks):
    first, second = two_ranks.run(refused, list(ON_RANK_1))
    assert second["nothing to train on rank 1"].startswith(NOTHING_TO_TRAIN)
    assert first["nothing to train on rank 1"].startswith(f"RuntimeError: rank 1 failed: {NOTHING_TO_TRAIN}")
    for found in (first, second):
        assert found["other model on rank 1"].startswith("RuntimeError: config or model: ranks 0 and 1 differ")


def starved(stage: int) -> str:
    """Rank 1's node has next to nothing left; then there is enough."""
    with mock.patch.object(states, "available_bytes", lambda: 2**40 if dist.get_rank() == 0 else 4096):
        error = error_of(lambda: engine_of(ds_config(stage, "bf16", {})))
    run_steps(engine_of(ds_config(stage, "bf16", {})), 1)
    return error


@pytest.mark.parametrize("stage", [2, 3])
def test_a_node_without_memory_for_the_state_is_one_sentence_on_every_rank(two_ranks, stage):
    for error in two_ranks.run(starved, stage):
        assert error.startswith("MemoryError: optimizer state: 0.0 GiB of host memory are needed on "), error
        assert "(2 ranks) and 0.0 GiB are available: free some or raise the limit" in error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(launcher: list[str], case: str, folder: Path) -> tuple[int, list[str], str]:
    """Exit code, what each rank met, and all output of a two-rank program."""
    of_a_launcher = re.compile(r"RANK|WORLD_SIZE|MASTER_|LOCAL_|GROUP_|TORCHELASTIC|OMPI_|PMIX_")
    clean = {name: value for name, value in os.environ.items() if not of_a_launcher.match(name)}
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests.parent), str(tests)])
    environment = {**clean, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [*launcher, __file__, case, str(folder)], cwd=folder, env=environment, timeout=150,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    reports = [folder / f"rank{rank}.txt" for rank in range(2)]
    return done.returncode, [path.read_text() if path.exists() else "" for path in reports], done.stdout


@pytest.mark.slow
def test_a_torchrun_program_ends_with_one_ranks_error_on_every_rank(tmp_path):
    launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    code, reports, output = launched(launcher, "nothing to train on rank 1", tmp_path)
    assert code != 0
    assert [NOTHING_TO_TRAIN in report for report in reports] == [True, True], output
    assert NOTHING_TO_TRAIN in output


@pytest.mark.slow
def test_a_deepspeed_program_ends_with_the_error_on_every_rank(tmp_path):
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    code, reports, output = launched(launcher, "lamb", tmp_path)
    assert code != 0
    assert [report.startswith(BAD["lamb"][1]) for report in reports] == [True, True], output
    assert BAD["lamb"][1] in output


def main(name: str, folder: str) -> None:
    """One rank of a user's program: says what it met, then ends as any program does that does not catch it."""
    hift_ds.init_distributed()
    model, config, arguments = made(name)
    report = Path(folder, f"rank{dist.get_rank()}.txt")
    try:
        engine = hift_ds.initialize(model=model, config=config, **arguments)[0]
        run_steps(engine, 2)
    except Exception as error:
        report.write_text(f"{type(error).__name__}: {error}")
        raise
    report.write_text("trained")


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
