"""Cases that run on ranks: what is refused, activation checkpointing, the files in ds_configs/.

Also a script, `python -m hift_testing.error_cases NAME`: the case NAME of `CASES` as a user's program meets it.
"""

from __future__ import annotations

import copy
import io
import json
import math
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from deepspeed import comm as dist
from hift_testing.invariant_cases import (
    Warnings,
    changed,
    digest_of,
    error_of,
    fp16_allowed,
    state_by_block,
    weights_by_block,
)
from hift_testing.training import ds_config, engine_of, run_steps, small_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

import hift_ds
from hift_ds import cli


class OwnAdamW(torch.optim.AdamW):
    """A subclass, which may do anything."""


def _client(make: Any) -> Any:
    model, config, _ = _without_optimizer()
    return model, config, {"optimizer": make(model.parameters())}


def _config(hift: dict[str, Any] | None = None, stage: int = 2, **keys: Any) -> Any:
    return small_llama(), ds_config(stage, "fp32", hift or {}, **keys), {}


def _frozen(on_rank: int | None = None) -> Any:
    model = small_llama()
    if on_rank in (None, dist.get_rank()):
        model.requires_grad_(False)
    return model, ds_config(1, "fp32", {}), {}


def _other_model_on_rank_1() -> Any:
    return small_llama(layers=4 + dist.get_rank()), ds_config(1, "fp32", {}), {}


def _without_optimizer() -> Any:
    model, config, _ = _config()
    del config["optimizer"]
    return model, config, {}


def _zero(**keys: Any) -> Any:
    return _config(zero_optimization=keys)


# name -> (model, config, further arguments of initialize), made on each rank
CASES: dict[str, Any] = {
    "typo": lambda: _config({"layer_per_block": 2}),
    "type": lambda: _config({"layers_per_block": "2"}),
    "value": lambda: _config({"order": "bottom_up"}),
    "enabled": lambda: (small_llama(), {**ds_config(1), "hift": {"order": "random"}}, {}),
    "moments": lambda: _config({"state": {"moments": "int8"}}, optimizer={"type": "Adafactor", "params": {"lr": 1e-3}}),
    "master": lambda: _config({"state": {"master": "split16"}}),
    "on host and device": lambda: _config(
        {"state": {"residency": "device"}},
        zero_optimization={"stage": 1, "offload_optimizer": {"device": "cpu"}},
    ),
    "compact on host": lambda: _config(
        {"state": {"master": "split16", "moments": "int8"}}, bf16={"enabled": True},
        zero_optimization={"stage": 1, "offload_optimizer": {"device": "cpu"}},
    ),
    "kernel on host": lambda: _config({"kernel": "triton"}, zero_optimization={"cpu_offload": True, "stage": 2}),
    "compact in torch": lambda: _config({"kernel": "torch", "state": {"moments": "bf16"}}),
    "ring without streams": lambda: _config({"state": {"residency": "device", "ring_bytes": 1 << 20}}),
    "blocks and layers": lambda: _config({"layers_per_block": 2, "blocks": [["."]]}),
    "letters": lambda: (small_llama(), {**ds_config(1), "HiFT": {"enabled": True}, "hift": {"enabled": True}}, {}),
    "scheduler": lambda: _config(scheduler={"type": "Warmup", "params": {}}),
    "scheduler key": lambda: _config(scheduler={"type": "WarmupLR", "params": {"steps": 3}}),
    "batch": lambda: _config(train_batch_size=7),
    "micro batch": lambda: _config(train_micro_batch_size_per_gpu=0),
    "two precisions": lambda: _config(bf16={"enabled": True}, fp16={"enabled": True}),
    "stage": lambda: _zero(stage=4),
    "clip": lambda: _config(gradient_clipping="1"),
    "nothing to train": _frozen,
    "nothing to train on rank 1": lambda: _frozen(on_rank=1),
    "other model on rank 1": _other_model_on_rank_1,
    "two blocks": lambda: _config({"blocks": [["embed", r"layers\.[01]"], [r"layers\.[123]", "norm", "head"]]}),
    "no block": lambda: _config({"blocks": [["embed"], ["layers"]]}),
    "no match": lambda: _config({"frozen": ["layer_norm"]}),
    "bad regex": lambda: _config({"always_active": ["layers.(0"]}),
    "all always active": lambda: _config({"always_active": ["."]}),
    "all frozen": lambda: _config({"frozen": ["."]}),
    "lamb": lambda: _config(optimizer={"type": "Lamb", "params": {"lr": 1e-3}}),
    "transformers": lambda: _client(lambda params: transformers.Adafactor(params, lr=1e-3, relative_step=False)),
    "subclass": lambda: _client(OwnAdamW),
    "no optimizer": _without_optimizer,
    "optimizer key": lambda: _config(optimizer={"type": "AdamW", "params": {"learning_rate": 1e-3}}),
    "zenflow": lambda: _zero(zenflow={"topk_ratio": 0.1}),
    "nvme": lambda: _zero(offload_optimizer={"device": "nvme", "nvme_path": "x"}),
    "zero++": lambda: _zero(zero_quantized_weights=True),
    "auto": lambda: _config(gradient_clipping="auto"),
    "mpu": lambda: (*_config()[:2], {"mpu": object()}),
    "no model": lambda: (None, ds_config(1, "fp32", {}), {}),
    "half a param group": lambda: _half_a_param_group(),
}


def _half_a_param_group() -> Any:
    model, config, _ = _config()
    return model, config, {"model_parameters": list(model.parameters())[:5]}


def refused(names: list[str]) -> dict[str, str]:
    """`Type: message` of each case; then a good engine trains, to show that nothing is left broken."""
    found = {}
    for name in names:
        model, config, arguments = CASES[name]()
        found[name] = error_of(lambda m=model, c=config, a=arguments: hift_ds.initialize(model=m, config=c, **a))
    engine = engine_of(ds_config(2, "fp32", {}))
    run_steps(engine, 1)
    found["good"] = str(engine.hift.active_block)
    return found


def refused_by_plan(names: list[str], folder: str) -> dict[str, str]:
    """What `hift-ds plan --deepspeed_config` says of the same models and configs, on rank 0."""
    found = {}
    if dist.get_rank() == 0:
        for name in names:
            model, config, _ = CASES[name]()
            model.config.save_pretrained(folder)
            path = Path(folder, "ds_config.json")
            path.write_text(json.dumps(config))
            err = io.StringIO()
            with redirect_stderr(err), redirect_stdout(io.StringIO()):
                options = ["--model", folder, "--deepspeed_config", str(path), "--gpus", "2", "--seq", "8"]
                code = cli.main(["plan", *options])
            found[name] = f"exit {code}: {err.getvalue().strip()}"
    dist.barrier()
    return found


def activation_checkpointing(stage: int, reentrant: bool | None, steps: int = 7) -> dict[str, Any]:
    """Trains top-down; `reentrant` = None is the run without checkpointing.

    Returns:
        `alive`: by step, whether each layer's output had a gradient; `recomputed`: how often backward ran it again.
    """
    model = small_llama()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    with Warnings("hift_ds.zero.activations") as messages:
        engine = engine_of(ds_config(stage, "fp32", {"order": "top2down"}), model)
    layers = engine.module.model.layers
    alive, runs = [False] * len(layers), [0] * len(layers)

    def count(index: int) -> None:
        runs[index] += 1

    for index, layer in enumerate(layers):
        # Inside the layer, for transformers checkpoints its forward without its hooks; and before the mlp runs, for a
        # recomputation ends as soon as all that backward needs is there.
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: count(index))
        layer.register_forward_hook(lambda _, __, out, index=index: alive.__setitem__(index, out.requires_grad))
    facts: dict[str, Any] = {"alive": [], "recomputed": [], "active": []}
    for step in range(steps):
        runs[:] = [0] * len(layers)
        facts["active"].append(engine.hift.active_block)
        run_steps(engine, 1, start=step)
        facts["alive"].append(list(alive))
        facts["recomputed"].append([count - 1 for count in runs])
    facts["digest"] = digest_of(weights_by_block(engine)) + digest_of(state_by_block(engine))
    facts["warnings"] = list(messages)
    return facts


class Reentrant(nn.Module):
    """Calls torch's reentrant checkpoint itself, where nothing of ours can switch it."""

    def __init__(self, head: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(6, 6) if head else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return self.head(x).square().mean()


def own_reentrant_checkpoint(stage: int, always: bool) -> dict[str, Any]:
    """A block inside of it gets no gradient; with `always` a head outside does."""
    hift: dict[str, Any] = {"layers_per_block": 1, **({"always_active": ["^head"]} if always else {})}
    engine = engine_of(ds_config(stage, "fp32", hift), Reentrant(always))
    before = {**weights_by_block(engine), **{f"state {k}": v for k, v in state_by_block(engine).items()}}

    def train() -> None:
        engine.backward(engine(torch.ones(2, 6)))
        engine.step()

    error = error_of(train)
    after = {**weights_by_block(engine), **{f"state {k}": v for k, v in state_by_block(engine).items()}}
    return {"error": error, "changed": changed(before, after)}


def config_file(path: str, steps: int) -> dict[str, Any]:
    """Trains with a file of ds_configs/ as it is until `steps` steps are applied."""
    half = json.loads(Path(path).read_text()).get("fp16", {}).get("enabled", False)
    with fp16_allowed() if half else nullcontext():
        engine = engine_of(path, small_llama())
    losses, attempts = [], 0
    before = state_by_block(engine)
    while engine.hift.active_block < steps and attempts < 12:
        losses += run_steps(engine, 1, start=attempts)
        attempts += 1
    return {
        "finite": all(map(math.isfinite, losses)),
        "windows": len(losses) / engine.gradient_accumulation_steps(),
        "attempts": attempts,
        "skipped": engine.skipped_steps,
        "state": changed(before, state_by_block(engine)),
        "stage": engine.zero_optimization_stage(),
        "dtype": str(next(iter(engine.module.parameters())).dtype),
    }


def main(name: str, folder: str) -> None:
    """One rank of a user's program: says what it met, then ends as any program does that does not catch it."""
    hift_ds.init_distributed()
    model, config, arguments = CASES[name]()
    report = Path(folder, f"rank{dist.get_rank()}.txt")
    try:
        engine = hift_ds.initialize(model=model, config=copy.deepcopy(config), **arguments)[0]
        run_steps(engine, 2)
    except Exception as error:
        report.write_text(f"{type(error).__name__}: {error}")
        raise
    report.write_text("trained")


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
