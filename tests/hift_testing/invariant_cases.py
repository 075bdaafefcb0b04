"""Cases that run on ranks: what changes at a step of HiFT, and what must not."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from hift_testing.reference import ReferenceHiFT
from hift_testing.training import (
    ADAMW,
    batch_of,
    cast_parameters,
    ds_config,
    engine_of,
    largest_difference,
    run_steps,
    small_llama,
    whole_weights,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR


def digest(tensors: Any) -> str:
    """A fingerprint of tensors' bytes, in order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def weights_by_block(engine: Any) -> dict[str, str]:
    """Fingerprints of each block's whole weights, of the always-active ones, and of each frozen one. Collective."""
    weights, plan = whole_weights(engine), engine.block_plan
    found = {str(block.index): digest(weights[fqn] for fqn in block.fqns) for block in plan.blocks}
    found["always"] = digest(weights[fqn] for fqn in plan.always_active)
    return {**found, **{fqn: digest([weights[fqn]]) for fqn in plan.frozen}}


def state_by_block(engine: Any) -> dict[str, str]:
    """Fingerprints of each block's master, slots and step on this rank."""
    engine.optimizer.settle()
    states = dict(enumerate(engine.optimizer.states))
    if engine.optimizer.always is not None:
        states["always"] = engine.optimizer.always
    # Without master the shard itself is the master.
    return {
        str(name): digest([*state.slots.values(), state.master if state.master is not None else torch.empty(0)])
        + f" {state.step}"
        for name, state in states.items()
    }


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names whose fingerprint differs."""
    return [name for name in before if before[name] != after[name]]


def watch(
    stage: int,
    dtype: str,
    hift: dict[str, Any],
    cycles: int = 2,
    accumulation: int = 1,
    user_frozen: str = "",
    evaluate: bool = False,
) -> dict[str, Any]:
    """Trains and notes at every step what has changed.

    Args:
        user_frozen: Regex of parameters with requires_grad=False before `initialize`.
        evaluate: Run forwards without gradient between micro steps and between steps.
    """
    model = small_llama()
    for name, param in model.named_parameters():
        if user_frozen and re.search(user_frozen, name):
            param.requires_grad_(False)
    engine = engine_of(ds_config(stage, dtype, hift, gradient_accumulation_steps=accumulation), model)
    named, rank = dict(engine.module.named_parameters()), dist.get_rank()
    record, weights, state = [], weights_by_block(engine), state_by_block(engine)
    for step in range(cycles * engine.optimizer.rotation.steps_per_cycle):
        active = engine.hift.active_block
        trains = {*engine.hift.blocks[active].fqns, *engine.block_plan.always_active}
        faults = []
        for micro in range(accumulation):
            for name, param in named.items():
                if param.requires_grad != (name in trains):
                    faults.append(f"requires_grad of {name} is {param.requires_grad}")
            loss = engine(**batch_of(step, micro, rank)).loss
            if evaluate:
                evaluation(engine)
            engine.backward(loss)
            faults += [f"gradient of {name}" for name, p in named.items() if p.grad is not None and name not in trains]
            if engine.hift.active_block != active:
                faults.append(f"rotated in micro step {micro}")
            engine.step()
            if micro + 1 < accumulation and changed(weights, weights_by_block(engine)):
                faults.append(f"weights changed in micro step {micro}")
        if evaluate:
            evaluation(engine)
        faults += [f"gradient of {name} after step" for name, param in named.items() if param.grad is not None]
        after, state_after = weights_by_block(engine), state_by_block(engine)
        record.append(
            {
                "active": active,
                "weights": changed(weights, after),
                "state": changed(state, state_after),
                "steps": [block.step for block in engine.optimizer.states],
                "digest": digest_of(after),
                "faults": faults,
                "cycle": engine.hift.cycle,
            }
        )
        weights, state = after, state_after
    return {"record": record, "blocks": len(engine.hift.blocks), "order": engine.hift.order, "names": sorted(after)}


def digest_of(by_block: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(by_block.items())).encode()).hexdigest()


def evaluation(engine: Any) -> None:
    """A forward in eval mode without gradient, as a validation loop does it."""
    engine.eval()
    with torch.no_grad():
        engine(**batch_of(99, 0, dist.get_rank()))
    engine.train()


def window(hift: dict[str, Any]) -> dict[str, Any]:
    """`engine.hift` at the start and after one cycle and a step."""
    engine = engine_of(ds_config(2, "bf16", hift))
    view = engine.hift
    start = {"active": view.active_block, "cycle": view.cycle, "order": view.order}
    run_steps(engine, len(view.blocks) + 1)
    return {
        "start": start,
        "active": view.active_block,
        "cycle": view.cycle,
        "blocks": [(block.name, list(block.fqns), block.numel) for block in view.blocks],
        "host_bytes": view.host_bytes,
        "numel": {name: param.numel() for name, param in engine.module.named_parameters()},
        "summary": view.summary(),
        "lr": engine.get_lr(),
    }


def error_of(action: Any) -> str:
    """`Type: message` of what `action` raises; the pool lives on."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def ranks_disagree(stage: int, hift: dict[str, Any] | None = None) -> dict[str, Any]:
    """The last rank believes that another block's turn has come."""
    engine = engine_of(ds_config(stage, "fp32", hift or {}))
    run_steps(engine, 2)
    before = weights_by_block(engine)
    if dist.get_rank() == dist.get_world_size() - 1:
        engine.optimizer.rotation.step += 1
    error = error_of(lambda: run_steps(engine, 1, start=2)) or error_of(engine.optimizer.settle)
    return {"error": error, "changed": changed(before, weights_by_block(engine))}


def other_seed_on_one_rank() -> str:
    """A config that differs between ranks."""
    return error_of(lambda: engine_of(ds_config(1, "fp32", {"order": "random", "seed": dist.get_rank()})))


class Branches(nn.Module):
    """Two branches after a common layer; a batch takes one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)])

    def forward(self, x: torch.Tensor, branch: int) -> torch.Tensor:
        return self.layers[branch](self.layers[0](x)).square().mean()


def branch_steps(
    stage: int, branches: tuple[int, int], steps: int, hift: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Rank r's batches go through branch `branches[r]` at every step; three blocks."""
    hift = {"blocks": [["^layers.0"], ["^layers.1"], ["^layers.2"]], **(hift or {})}
    engine = engine_of(ds_config(stage, "fp32", hift), Branches())
    rank, before = dist.get_rank(), weights_by_block(engine)

    def train() -> None:
        for step in range(steps):
            x = torch.randn(2, 5, generator=torch.Generator().manual_seed(10 * step + rank))
            engine.backward(engine(x, branches[rank]))
            engine.step()

    error = error_of(train) or error_of(engine.optimizer.settle)
    after = weights_by_block(engine)
    counts = [state.step for state in engine.optimizer.states]
    return {"error": error, "changed": changed(before, after), "digest": digest_of(after), "counts": counts}


class Warnings(logging.Handler):
    """Collects the messages of a logger inside `with`."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.WARNING)
        self.name_of_logger, self.messages = name, []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger(self.name_of_logger).addHandler(self)
        return self.messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger(self.name_of_logger).removeHandler(self)


def rates(
    stage: int, lr_update: str, scheduler: str, steps: int, poisoned: tuple[int, ...] = (), lr: float = 1e-3
) -> dict[str, Any]:
    """Learning rates in force at each step of a run over six blocks.

    Args:
        scheduler: `config` (linear warm-up and decay), `object` (LambdaLR: (step + 1) * lr), `callable` (StepLR: halved
            every 5 steps), `decay` (LambdaLR: linear to 0 at the run's end), `one_rank_differs` (as `object`, with a
            file open on rank 1) or `outside` (LambdaLR: step * lr, stepped by the caller after each engine.step()).
        poisoned: Steps whose gradient has a nan on the last rank.
    """
    model, config, given = small_llama(), ds_config(stage, "fp32", {"lr_update": lr_update}), {}
    config["optimizer"]["params"]["lr"] = lr
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if scheduler == "config":
        params = {"total_num_steps": 18, "warmup_num_steps": 4, "warmup_type": "linear", "warmup_max_lr": 0.014}
        config["scheduler"] = {"type": "WarmupDecayLR", "params": params}
    elif scheduler in ("object", "one_rank_differs"):
        given = {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, lambda step: step + 1)}
        if scheduler == "one_rank_differs" and dist.get_rank() == 1:
            given["lr_scheduler"].log = open(os.devnull, "w")  # noqa: SIM115
    elif scheduler == "decay":
        schedule = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        given = {"optimizer": optimizer, "lr_scheduler": schedule}
    elif scheduler == "callable":
        given = {"lr_scheduler": lambda holder: StepLR(holder, 5, 0.5)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = engine_of(config, model, **given)
        outside = LambdaLR(engine.basic_optimizer, lambda step: float(step)) if scheduler == "outside" else None
        found = {"rates": [], "blocks": [], "scheduled": []}
        for step in range(steps):
            if step in poisoned:
                poison_next_gradient(engine)
            run_steps(engine, 1, start=step)
            if outside is not None:
                outside.step()
            found["rates"].append(engine.get_lr()[0])
            found["blocks"].append(engine.hift.active_block)
            found["scheduled"].append(engine.optimizer.param_groups[0]["lr"])
    found["warnings"] = [str(w.message) for w in caught if "lr_scheduler" in str(w.message)]
    return found


def poison_next_gradient(engine: Any, value: float = float("nan")) -> None:
    """One element of one gradient of the active block becomes `value` on the last rank, at the next backward only."""
    if dist.get_rank() < dist.get_world_size() - 1:
        return
    fqn = engine.hift.blocks[engine.hift.active_block].fqns[-1]

    def poison(grad: torch.Tensor) -> torch.Tensor:
        handle.remove()
        grad = grad.clone()
        grad.view(-1)[-1] = value
        return grad

    handle = dict(engine.module.named_parameters())[fqn].register_hook(poison)


@contextmanager
def fp16_allowed() -> Iterator[None]:
    """DeepSpeed refuses fp16 on a CPU without fp16 instructions; torch computes there all the same, only slowly."""
    accelerator = get_accelerator()
    if accelerator.is_fp16_supported():
        yield
        return
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


class ScaledReference(ReferenceHiFT):
    """The loss is multiplied by `loss_scale` before backward, the averaged fp32 gradient divided by it."""

    loss_scale = 1.0

    def _gradients(self, batch, active, micro_steps):
        return super()._gradients(batch, active, micro_steps / self.loss_scale)

    def _averaged_gradients(self, batches, active):
        grads = super()._averaged_gradients(batches, active)
        return {name: grad / self.loss_scale for name, grad in grads.items()}


def _adamw(members: list[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([tensor for _, tensor in members], foreach=False, **ADAMW["params"])


def fp16_run(stage: int, fp16: dict[str, Any], applied: int, compare: bool = True) -> dict[str, Any]:
    """Trains until `applied` steps have been applied, the same batch again after a skipped one.

    Returns:
        `attempts`: per engine.step() whether it overflowed, the loss scale after it, and what it changed; `difference`:
        of the weights from a reference that starts at the scale which the run ended with; `norm`: of the last norm.
    """
    with fp16_allowed():
        config = ds_config(stage, "fp16", {"lr_update": "step"})
        warmup = {"warmup_num_steps": 10, "warmup_type": "linear", "warmup_min_lr": 1e-3, "warmup_max_lr": 2e-3}
        config["scheduler"] = {"type": "WarmupLR", "params": warmup}
        config["fp16"] = {"enabled": True, **fp16}
        engine = engine_of(config)
    attempts, step, weights, state = [], 0, weights_by_block(engine), state_by_block(engine)
    while step < applied:
        if len(attempts) > 40:
            raise RuntimeError("the loss scale does not come down")
        active, iteration = engine.hift.active_block, engine.lr_scheduler.last_batch_iteration
        skipped = engine.skipped_steps
        run_steps(engine, 1, start=step)
        after, state_after = weights_by_block(engine), state_by_block(engine)
        attempts.append(
            {
                "overflow": engine.optimizer.overflow,
                "applied": engine.was_step_applied(),
                "skipped": engine.skipped_steps - skipped,
                "scheduled": engine.lr_scheduler.last_batch_iteration - iteration,
                "scale": engine.optimizer.loss_scale,
                "rotated": engine.hift.active_block != active,
                "weights": changed(weights, after),
                "state": changed(state, state_after),
                "lr": engine.get_lr()[0],
                "norm": float(engine.get_global_grad_norm()),
            }
        )
        step += not engine.optimizer.overflow
        weights, state = after, state_after
    found: dict[str, Any] = {"attempts": attempts, "active": [block % 6 for block in range(applied)]}
    if compare:
        lrs = [attempt["lr"] for attempt in attempts if not attempt["overflow"]]
        model = cast_parameters(small_llama(), torch.float16)
        oracle = ScaledReference(
            model, [block.fqns for block in engine.hift.blocks], engine.hift.order, _adamw, lambda step: lrs[step],
            accumulate_before_reducing=stage < 2,
        )  # fmt: skip
        oracle.loss_scale = engine.optimizer.loss_scale
        for step in range(applied):
            oracle.step([[batch_of(step, 0, rank)] for rank in range(dist.get_world_size())])
        found["difference"] = largest_difference(whole_weights(engine), dict(model.named_parameters()))
        found["moved"] = largest_difference(
            whole_weights(engine), dict(cast_parameters(small_llama(), torch.float16).named_parameters())
        )
        found["norm"] = abs(engine.get_global_grad_norm() - oracle.norms[-1]) / oracle.norms[-1]
    return found


def poisoned_run(
    stage: int, dtype: str, value: float, steps: int, poisoned: int, hift: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One non-finite gradient element, on the last rank, at step `poisoned` (counted in engine.step() calls)."""
    engine = engine_of(ds_config(stage, dtype, hift or {}))
    found: dict[str, Any] = {"changed": [], "blocks": [], "applied": []}
    with Warnings("hift_ds.zero") as found["warnings"]:
        _poisoned_steps(engine, found, value, steps, poisoned)
    found.update(skipped=engine.skipped_steps, digest=digest_of(weights_by_block(engine)))
    found["counts"] = [state.step for state in engine.optimizer.states]
    return found


def _poisoned_steps(engine: Any, found: dict[str, Any], value: float, steps: int, poisoned: int) -> None:
    for step in range(steps):
        before = {**weights_by_block(engine), **{f"state {k}": v for k, v in state_by_block(engine).items()}}
        if step == poisoned:
            poison_next_gradient(engine, value)
        run_steps(engine, 1, start=step)
        after = {**weights_by_block(engine), **{f"state {k}": v for k, v in state_by_block(engine).items()}}
        found["changed"].append(changed(before, after))
        found["blocks"].append(engine.hift.active_block)
        found["applied"].append(engine.was_step_applied())
