"""`kernel: triton` through the engine, interpreted: the same training as `kernel: torch`, and numpy's bits."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from deepspeed import comm as dist
from hift_testing import fused_oracle
from hift_testing.messages import error_of, logged
from hift_testing.parity import RULES
from hift_testing.selection import slow
from hift_testing.training import batch_of, ds_config, engine_of, run_steps, whole_weights

from hift_ds import start
from hift_ds.config.kernels import KernelChoice

pytestmark = pytest.mark.multi_rank

TORCH, TRITON, WRONG = KernelChoice("torch"), KernelChoice("triton"), KernelChoice("torch", "wrong bits")
PAIR = {"layers_per_block": 3}


def agreed_kernels(choices: list[KernelChoice], kernel: str, warning: int | None) -> None:
    """Two steps of an engine whose ranks have made these choices by themselves; `warning`: whose is named."""
    rank = dist.get_rank()
    with mock.patch.object(start, "choose_kernel", lambda *_: choices[rank]), logged(start.logger.name) as warnings:
        engine = engine_of(ds_config(2, "bf16", PAIR))
    run_steps(engine, 2)
    assert engine.optimizer.config.kernel == kernel
    said = [text for text in warnings if "kernel" in text]
    sentence = f"hift.kernel=null: updates run in eager torch: rank {warning}: wrong bits"
    assert said == ([] if warning is None or rank else [sentence])


@pytest.mark.parametrize(
    ("choices", "kernel", "warning"),
    [
        ([TRITON, TRITON], "triton", None), ([TORCH, TORCH], "torch", None), ([TRITON, WRONG], "torch", 1),
        ([WRONG, TRITON], "torch", 0), ([WRONG, WRONG], "torch", 0),
    ],
)  # fmt: skip
def test_all_ranks_run_the_same_kernel_and_rank_0_says_once_why_not_the_fused(two_ranks, choices, kernel, warning):
    two_ranks.run(agreed_kernels, choices, kernel, warning)


def refused_kernel() -> str:
    """What `initialize` raises where the last rank refuses the kernel."""

    def choose(*args: Any) -> KernelChoice:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise ValueError("hift.kernel='triton': no compiler")
        return TRITON

    with mock.patch.object(start, "choose_kernel", choose):
        return error_of(lambda: engine_of(ds_config(2, "bf16", PAIR)))


def test_a_kernel_that_one_rank_refuses_is_an_error_on_all(two_ranks):
    error = "ValueError: hift.kernel='triton': no compiler"
    assert two_ranks.run(refused_kernel) == [f"RuntimeError: rank 1 failed: {error}", error]


def kernel_engine(
    stage: int, dtype: str, rule: str, kernel: str, clip: float = 0.0, hift: dict[str, Any] | None = None
) -> Any:
    config = ds_config(stage, dtype, {**PAIR, **(hift or {}), "kernel": kernel}, gradient_clipping=clip,
                       optimizer=copy.deepcopy(RULES[rule][0]))  # fmt: skip
    return engine_of(config)


def kernels_agree(
    stage: int, dtype: str, rule: str, clip: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Two rotations with `kernel: triton` and with `kernel: torch` on the same batches. Collective.

    Returns:
        All weights of either, and the largest difference of a loss.
    """
    runs, losses = [], []
    for kernel in ("triton", "torch"):
        engine = kernel_engine(stage, dtype, rule, kernel, clip)
        begin = whole_weights(engine)
        losses.append(run_steps(engine, 2 * len(engine.hift.blocks)))
        assert engine.optimizer.config.kernel == kernel
        runs.append(whole_weights(engine))
    ours, theirs, begin = (torch.cat([w.double().flatten() for w in run.values()]) for run in (*runs, begin))
    assert (ours - begin).abs().mean() > 1e-4
    return ours, theirs, max(abs(a - b) for a, b in zip(*losses, strict=True))


def agree_in_fp32(stage: int, rule: str) -> None:
    ours, theirs, loss = kernels_agree(stage, "fp32", rule)
    # Two fp32 spacings of a weight's magnitude, of 1/64 below that.
    spacing = torch.from_numpy(np.spacing(theirs.abs().clamp(min=1 / 64).float().numpy())).double()
    assert ((ours - theirs).abs() > 2 * spacing).double().mean() < 0.02
    assert (ours - theirs).abs().max() < 1e-6
    assert loss < 1e-5


def agree_in_bf16(rule: str) -> None:
    ours, theirs, _ = kernels_agree(2, "bf16", rule, clip=0.5)
    assert (ours != theirs).double().mean() < 2e-3


@pytest.mark.parametrize(
    ("stage", "rule"),
    [
        slow(0, "adamw"), slow(2, "sgd_momentum"), (3, "adafactor"), slow(0, "sgd_momentum"), slow(0, "adafactor"),
        slow(2, "adamw"), slow(2, "adafactor"), slow(3, "adamw"), slow(3, "sgd_momentum"),
    ],
)  # fmt: skip
def test_fused_training_in_fp32_equals_eager_training_to_the_last_bits(two_ranks, stage, rule):
    """Two turns of each block. The rules differ in their last bits (torch's CPU square root is not correctly rounded;
    the order of operations), the next gradients then differ in theirs, and where a gradient is nearly 0 Adam's
    quotient enlarges that."""
    two_ranks.run(agree_in_fp32, stage, rule)



@pytest.mark.parametrize("rule", ["adamw", slow("adafactor")])  # the others have numpy's bits, below
def test_fused_training_in_bf16_with_clipping_equals_eager_training(two_ranks, rule):
    """fp32 masters that differ in a last bit round to the same bf16, but for a few at the edge between two."""
    two_ranks.run(agree_in_bf16, rule)



ORDER = ("scale", "found_inf", "step_size", "inv_sqrt_bc2", "decay", "rate", "norm", "step")
ORACLE = {"adam_l2": "adamw", "sgd_momentum": "sgd"}


def oracle_hyper(rule: str) -> dict[str, Any]:
    hyper = {key: value for key, value in RULES[rule][2].items() if key != "lr"}
    if "betas" in hyper:
        hyper["beta1"], hyper["beta2"] = hyper.pop("betas")
    if rule == "lion":
        del hyper["weight_decay"]
    if rule == "adam_l2":
        hyper["decoupled"] = False
    return hyper


def arrays_of(state: Any, grad: torch.Tensor) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Master and slots in fp32 and the gradient, of every parameter's slice without padding."""

    def whole(key: str | None) -> np.ndarray:
        return torch.cat([state.read(index, key) for index in range(len(state.shard.segments))]).numpy().copy()

    kept = torch.cat([torch.arange(s.offset, s.offset + s.numel) for s in state.shard.segments])
    return whole(None), {name: whole(name) for name in state.slots}, grad.float()[kept].numpy().copy()


def renamed(slots: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"accumulator" if name == "sum" else name: array for name, array in slots.items()}


def engine_against_numpy(rule: str, state_form: dict[str, Any] | None = None) -> None:
    """Two rotations in bf16 with `kernel: triton`; each update repeated in numpy from the same gradient. Collective.

    Args:
        state_form: `hift.state`.
    """
    engine = kernel_engine(2, "bf16", rule, "triton", hift={"always_active": ["norm"], "state": state_form})
    optimizer, hyper = engine.optimizer, oracle_hyper(rule)
    checked = 0
    for step in range(2 * len(engine.hift.blocks)):
        engine.backward(engine(**batch_of(step, 0, torch.distributed.get_rank())).loss)
        states = list(optimizer.active_states())
        before = [arrays_of(state, optimizer.reducer.averaged(state.shard)) for state in states]
        engine.step()
        for state, (master, slots, grad) in zip(states, before, strict=True):
            lr = RULES[rule][2]["lr"]
            prepared = {**optimizer.rule.prepared(optimizer.param_groups[0]), "lr": lr}
            scalars = fused_oracle.scalars(0.0, 1.0, state.step - 1, **prepared)
            vector = np.array([scalars[name] for name in ORDER], dtype=np.float32)
            fused_oracle.RULES[ORACLE.get(rule, rule)](master, grad, renamed(slots), vector, **hyper)
            after = arrays_of(state, torch.zeros(state.shard.numel))
            for found, expected in ((after[0], master), *((after[1][name], slots[name]) for name in slots)):
                assert (found.view(np.int32) == expected.view(np.int32)).all(), step
                checked += expected.size
    assert checked > 10_000


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "adafactor"])
def test_every_update_has_the_bits_of_numpy_s(two_ranks, rule):
    two_ranks.run(engine_against_numpy, rule)


def test_every_update_of_a_split_master_has_the_bits_of_numpy_s_fp32(two_ranks):
    two_ranks.run(engine_against_numpy, "adamw", {"master": "split16"})


def forms_agree(stage: int, rule: str, state: dict[str, Any]) -> None:
    """Two rotations in bf16 with a compact `hift.state` and with fp32 state. Collective."""
    masters, sizes = [], []
    for form in (state, {}):
        engine = kernel_engine(stage, "bf16", rule, "triton", hift={"state": form})
        begin = masters_of(engine)
        run_steps(engine, 2 * len(engine.hift.blocks))
        masters.append(masters_of(engine))
        sizes.append(engine.hift.host_bytes)
    moved = (masters[1] - begin).abs().mean()
    assert moved > 1e-5
    assert (masters[0] - masters[1]).abs().mean() < 0.15 * moved
    assert sizes[0] < 0.9 * sizes[1]


def masters_of(engine: Any) -> torch.Tensor:
    engine.optimizer.settle()
    states = engine.optimizer.states
    return torch.cat([state.read(i, None).double() for state in states for i in range(len(state.shard.segments))])


LOSSY = [
    ("adamw", {"moments": "int8"}), slow("adamw", {"master": "split16", "moments": "bf16"}),
    slow("lion", {"moments": "bf16"}), ("sgd_momentum", {"master": "none", "moments": "bf16"}),
    ("adagrad", {"moments": "bf16"}), slow("sgd_momentum", {"moments": "int8"}),
    ("lion", {"master": "split16", "moments": "int8"}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "state"), LOSSY)
def test_compact_state_trains_as_fp32_state_does_but_for_its_rounding(two_ranks, rule, state):
    """Two turns of each block: the error of a moment (8-bit codes are off by some per cent) times the way that weights
    have gone."""
    two_ranks.run(forms_agree, 2, rule, state)
