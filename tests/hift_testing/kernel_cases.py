"""Cases that run on ranks: training with the fused kernels (interpreted on a CPU) against eager torch and numpy."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from deepspeed import comm as dist
from hift_testing import fused_oracle
from hift_testing.parity_cases import RULES
from hift_testing.training import batch_of, ds_config, engine_of, run_steps, whole_weights

from hift_ds import start as start_module
from hift_ds.config.kernels import KernelChoice

HIFT = {"layers_per_block": 3}


def _engine(
    stage: int, dtype: str, rule: str, kernel: str, clip: float = 0.0, hift: dict[str, Any] | None = None
) -> Any:
    config = ds_config(stage, dtype, {**HIFT, **(hift or {}), "kernel": kernel}, gradient_clipping=clip,
                       optimizer=copy.deepcopy(RULES[rule][0]))  # fmt: skip
    return engine_of(config)


def kernels_agree(stage: int, dtype: str, rule: str, clip: float = 0.0) -> dict[str, Any]:
    """Two rotations with `kernel: triton` and with `kernel: torch` on the same batches. Collective.

    Returns:
        `largest`: largest difference of a weight; `beyond`: share of the weights that differ by more than two fp32
        spacings of their magnitude (of 1/64 below that); `share`: that differ at all; `moved`: how far weights moved,
        on average; `losses`: largest difference of a loss.
    """
    runs, losses = [], []
    for kernel in ("triton", "torch"):
        engine = _engine(stage, dtype, rule, kernel, clip)
        start = whole_weights(engine)
        losses.append(run_steps(engine, 2 * len(engine.hift.blocks)))
        assert engine.optimizer.config.kernel == kernel
        runs.append(whole_weights(engine))
    ours, theirs = (torch.cat([w.double().flatten() for w in run.values()]) for run in runs)
    spacing = torch.from_numpy(np.spacing(theirs.abs().clamp(min=1 / 64).float().numpy())).double()
    begin = torch.cat([w.double().flatten() for w in start.values()])
    return {
        "largest": (ours - theirs).abs().max().item(),
        "beyond": ((ours - theirs).abs() > 2 * spacing).double().mean().item(),
        "share": (ours != theirs).double().mean().item(),
        "moved": (ours - begin).abs().mean().item(),
        "losses": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }


def engine_against_numpy(rule: str, state_form: dict[str, Any] | None = None) -> dict[str, Any]:
    """Two rotations in bf16 with `kernel: triton`; each update repeated in numpy from the same gradient. Collective.

    Args:
        state_form: `hift.state`.

    Returns:
        `wrong`: bits of masters, state and model weights that differ; `checked`: how many were compared.
    """
    engine = _engine(2, "bf16", rule, "triton", hift={"always_active": ["norm"], "state": state_form})
    optimizer, hyper = engine.optimizer, _oracle_hyper(rule)
    wrong = checked = 0
    for step in range(2 * len(engine.hift.blocks)):
        engine.backward(engine(**batch_of(step, 0, torch.distributed.get_rank())).loss)
        states = list(optimizer.active_states())
        before = [_as_numpy(state, optimizer.reducer.averaged(state.shard)) for state in states]
        engine.step()
        for state, (master, slots, grad) in zip(states, before, strict=True):
            lr = RULES[rule][2]["lr"]
            prepared = {**optimizer.rule.prepared(optimizer.param_groups[0]), "lr": lr}
            scalars = fused_oracle.scalars(0.0, 1.0, state.step - 1, **prepared)
            vector = np.array([scalars[name] for name in _ORDER], dtype=np.float32)
            fused_oracle.RULES[_ORACLE.get(rule, rule)](master, grad, _renamed(slots), vector, **hyper)
            after = _as_numpy(state, torch.zeros(state.shard.numel))
            for found, expected in ((after[0], master), *((after[1][name], slots[name]) for name in slots)):
                wrong += int((found.view(np.int32) != expected.view(np.int32)).sum())
                checked += expected.size
    return {"wrong": wrong, "checked": checked}


def forms_agree(stage: int, rule: str, state: dict[str, Any]) -> dict[str, Any]:
    """Two rotations in bf16 with a compact `hift.state` and with fp32 state. Collective.

    Returns:
        `off`: mean difference of the masters as a share of `moved`, the mean way that they have gone; `bytes`: on the
        host, beside `fp32_bytes`.
    """
    masters, sizes = [], []
    for form in (state, {}):
        engine = _engine(stage, "bf16", rule, "triton", hift={"state": form})
        start = _masters(engine)
        run_steps(engine, 2 * len(engine.hift.blocks))
        masters.append(_masters(engine))
        sizes.append(engine.hift.host_bytes)
    moved = (masters[1] - start).abs().mean()
    return {
        "off": ((masters[0] - masters[1]).abs().mean() / moved).item(),
        "moved": moved.item(),
        "bytes": sizes[0],
        "fp32_bytes": sizes[1],
    }


def _masters(engine: Any) -> torch.Tensor:
    engine.optimizer.settle()
    states = engine.optimizer.states
    return torch.cat([state.read(i, None).double() for state in states for i in range(len(state.shard.segments))])


_ORDER = ("scale", "found_inf", "step_size", "inv_sqrt_bc2", "decay", "rate", "norm", "step")
_ORACLE = {"adam_l2": "adamw", "sgd_momentum": "sgd"}


def _oracle_hyper(rule: str) -> dict[str, Any]:
    hyper = {key: value for key, value in RULES[rule][2].items() if key != "lr"}
    if "betas" in hyper:
        hyper["beta1"], hyper["beta2"] = hyper.pop("betas")
    if rule == "lion":
        del hyper["weight_decay"]
    if rule == "adam_l2":
        hyper["decoupled"] = False
    return hyper


def _as_numpy(state: Any, grad: torch.Tensor) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Master and slots in fp32 and the gradient, of every parameter's slice without padding."""

    def whole(key: str | None) -> np.ndarray:
        return torch.cat([state.read(index, key) for index in range(len(state.shard.segments))]).numpy().copy()

    kept = torch.cat([torch.arange(s.offset, s.offset + s.numel) for s in state.shard.segments])
    return whole(None), {name: whole(name) for name in state.slots}, grad.float()[kept].numpy().copy()


def _renamed(slots: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"accumulator" if name == "sum" else name: array for name, array in slots.items()}


def agreed_kernels(choices: list[KernelChoice], refuses: bool = False) -> dict[str, Any]:
    """Two steps of an engine whose ranks have made these choices by themselves. Collective.

    Args:
        refuses: The last rank raises instead.

    Returns:
        `kernel`: what the engine runs; `warnings`; `error`: what `initialize` raised.
    """
    rank, warnings = dist.get_rank(), []

    def choose(*args: Any) -> KernelChoice:
        if refuses and rank == len(choices) - 1:
            raise ValueError("hift.kernel='triton': no compiler")
        return choices[rank]

    with mock.patch.object(start_module, "choose_kernel", choose), watched(start_module.logger, warnings):
        try:
            engine = engine_of(ds_config(2, "bf16", HIFT))
        except (ValueError, RuntimeError) as error:
            return {"error": str(error)}
    run_steps(engine, 2)
    return {"kernel": engine.optimizer.config.kernel, "warnings": [w for w in warnings if "kernel" in w]}


@contextmanager
def watched(logger: logging.Logger, messages: list[str]) -> Iterator[None]:
    """Inside, a logger's warnings are added to `messages`."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
