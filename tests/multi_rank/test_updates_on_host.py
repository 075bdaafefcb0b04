"""offload_optimizer cpu: the same training with the update on the host, and DeepSpeedCPUAdam's own."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from hift_testing.device_meter import separate_host
from hift_testing.fingerprints import digest, weights_by_block
from hift_testing.parity import RULES
from hift_testing.selection import slow
from hift_testing.training import ds_config, engine_of, largest_difference, run_steps, small_llama, whole_weights
from torch import nn

from hift_ds.rules.adam import Adam
from hift_ds.state import unit_state as state
from hift_ds.zero import host_update
from hift_ds.zero.host_update import HostUpdate

pytestmark = pytest.mark.multi_rank

ALWAYS = {"always_active": ["norm"]}



class StandInAdam:
    """What `HostUpdate` uses of DeepSpeedCPUAdam, which would compile a C++ op (`make slow` takes the real one)."""

    def __init__(self, params: list[nn.Parameter], adamw_mode: bool) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": params}]
        self.state: dict[nn.Parameter, dict[str, Any]] = {}
        self._rule = Adam(adamw_mode)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["step"] += 1
                hyper = {key: value for key, value in group.items() if key != "params"}
                self._rule.update(param.data, param.grad, state, hyper, lr=group["lr"], step=state["step"])


def moments_of(engine: Any) -> str:
    """Their fingerprint."""
    return digest(tensor for block in engine.optimizer.states for tensor in block.slots.values())


def host_training(
    stage: int, dtype: str, rule: str, hift: dict[str, Any], bound: float | None = None,
    key: tuple[str, Any] = ("offload_optimizer", {"device": "cpu"}),
) -> list[int]:
    """Nine steps with updates on the device, then on the host, as `key` of "zero_optimization" asks for; the same bits.

    Args:
        bound: DeepSpeed's own Adam, whose weights differ by less than that.

    Returns:
        Bytes on the host of either.
    """
    weights, digests, kinds, host = [], [], [], []
    for offload in ({}, dict([key])):
        stand_in = nullcontext() if bound else mock.patch.object(host_update, "DeepSpeedCPUAdam", StandInAdam)
        with separate_host(), stand_in, mock.patch.object(state, "TILE_NUMEL", 1000):
            section = copy.deepcopy(RULES[rule][0])
            config = ds_config(stage, dtype, hift, optimizer=section, zero_optimization=offload, gradient_clipping=0.5)
            engine = engine_of(config)
            run_steps(engine, 9)
        weights.append(whole_weights(engine))
        digests.append((weights_by_block(engine), moments_of(engine)))
        kinds.append(type(engine.optimizer._step.host_update).__name__)
        host.append(engine.hift.host_bytes)
    assert kinds == ["NoneType", "HostUpdate"]
    if bound is None:
        assert digests[0] == digests[1]
    else:
        assert largest_difference(*weights) < bound
    return host


@pytest.mark.parametrize(
    ("stage", "dtype", "rule", "hift"),
    [
        slow(0, "bf16", "adamw", {}), (1, "fp32", "adamw", ALWAYS), slow(2, "bf16", "adam_l2", {}),
        (3, "bf16", "adamw", ALWAYS), slow(3, "fp32", "sgd_momentum", {}), (2, "bf16", "adafactor", {}),
        (1, "bf16", "lion", {"inactive_state": "reset"}),
    ],
)  # fmt: skip
def test_training_is_bitwise_that_of_updates_on_the_device(two_ranks, stage, dtype, rule, hift):
    two_ranks.run(host_training, stage, dtype, rule, hift)


def test_the_old_key_asks_for_the_same(two_ranks):
    two_ranks.run(host_training, 2, "bf16", "adamw", {}, key=("cpu_offload", True))


def moved_to_the_host(folder: str, stage: int, dtype: str) -> None:
    """Weights and moments after 8 steps on the device, and after 5 there and 3 on the host, resumed."""
    found, stand_in = [], mock.patch.object(host_update, "DeepSpeedCPUAdam", StandInAdam)
    with separate_host(), stand_in:
        first = engine_of(ds_config(stage, dtype, {}))
        run_steps(first, 5)
        first.save_checkpoint(folder)
        offload = {"offload_optimizer": {"device": "cpu"}}
        second = engine_of(ds_config(stage, dtype, {}, zero_optimization=offload), small_llama(1))
        second.load_checkpoint(folder)
        for engine in (first, second):
            run_steps(engine, 3, start=5)
            found.append((weights_by_block(engine), moments_of(engine)))
    stayed, moved = found
    assert stayed == moved


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), slow(3, "fp32"), (2, "bf16")])
def test_a_run_on_the_device_goes_on_with_updates_on_the_host(two_ranks, tmp_path, stage, dtype):
    """fp32 weights have no master on the device, so the checkpoint has none."""
    two_ranks.run(moved_to_the_host, str(tmp_path), stage, dtype)


def test_an_op_that_cannot_be_built_is_refused_at_once(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("DeepSpeedCPUAdam requires the cpu_adam op") from OSError("c++ not found")

    monkeypatch.setattr("hift_ds.zero.host_update.DeepSpeedCPUAdam", fails)
    with pytest.raises(RuntimeError, match=r"offload_optimizer\.device='cpu': .* \(c\+\+ not found\); install a C\+\+"):
        HostUpdate(Adam(True), [], torch.device("cpu"), lambda tensor: tensor, [])


def test_fp32_weights_have_a_master_of_their_own_on_the_host(two_ranks):
    for device, host in two_ranks.run(host_training, 1, "fp32", "adamw", {}):
        assert host == device * 12 // 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype", "rule"), [(0, "bf16", "adamw"), (2, "fp32", "adam_l2"), (3, "bf16", "adamw")]
)
def test_deepspeed_s_cpu_adam_trains_as_the_eager_rule_does(two_ranks, compiled_adam, stage, dtype, rule):
    """Its loops use fused multiply-adds: masters differ in last bits, and one in some thousand bf16 weights then rounds
    to the next one (2^-8 of up to about 0.1)."""
    two_ranks.run(host_training, stage, dtype, rule, {}, bound=1e-3 if dtype == "bf16" else 2e-5)
