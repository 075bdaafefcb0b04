"""offload_optimizer cpu: the same training with the update on the host, and DeepSpeedCPUAdam's own."""

import copy

import pytest
import torch
from hift_testing import memory_cases as cases
from hift_testing.parity_cases import RULES
from hift_testing.selection import slow

from hift_ds.rules.adam import Adam
from hift_ds.zero.host_update import HostUpdate

pytestmark = pytest.mark.multi_rank

ALWAYS = {"always_active": ["norm"]}


@pytest.mark.parametrize(
    ("stage", "dtype", "rule", "hift"),
    [
        (0, "bf16", "adamw", {}), (1, "fp32", "adamw", ALWAYS), (2, "bf16", "adam_l2", {}),
        (3, "bf16", "adamw", ALWAYS), slow(3, "fp32", "sgd_momentum", {}), (2, "bf16", "adafactor", {}),
        (1, "bf16", "lion", {"inactive_state": "reset"}),
    ],
)  # fmt: skip
def test_training_is_bitwise_that_of_updates_on_the_device(two_ranks, stage, dtype, rule, hift):
    rule = copy.deepcopy(RULES[rule][0])
    for facts in two_ranks.run(cases.host_training, stage, dtype, rule, hift):
        assert facts["kinds"] == ["NoneType", "HostUpdate"]
        assert facts["same"] and facts["difference"] == 0.0


def test_the_old_key_asks_for_the_same(two_ranks):
    for facts in two_ranks.run(cases.host_training, 2, "bf16", RULES["adamw"][0], {}, key=("cpu_offload", True)):
        assert facts["kinds"] == ["NoneType", "HostUpdate"]
        assert facts["same"]


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), slow(3, "fp32"), (2, "bf16")])
def test_a_run_on_the_device_goes_on_with_updates_on_the_host(two_ranks, tmp_path, stage, dtype):
    """fp32 weights have no master on the device, so the checkpoint has none."""
    for stayed, moved in two_ranks.run(cases.moved_to_the_host, str(tmp_path), stage, dtype):
        assert stayed == moved


def test_an_op_that_cannot_be_built_is_refused_at_once(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("DeepSpeedCPUAdam requires the cpu_adam op") from OSError("c++ not found")

    monkeypatch.setattr("hift_ds.zero.host_update.DeepSpeedCPUAdam", fails)
    with pytest.raises(RuntimeError, match=r"offload_optimizer\.device='cpu': .* \(c\+\+ not found\); install a C\+\+"):
        HostUpdate(Adam(True), [], torch.device("cpu"), lambda tensor: tensor, [])


def test_fp32_weights_have_a_master_of_their_own_on_the_host(two_ranks):
    for facts in two_ranks.run(cases.host_training, 1, "fp32", RULES["adamw"][0], {}):
        device, host = facts["host"]
        assert host == device * 12 // 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype", "rule"), [(0, "bf16", "adamw"), (2, "fp32", "adam_l2"), (3, "bf16", "adamw")]
)
def test_deepspeed_s_cpu_adam_trains_as_the_eager_rule_does(two_ranks, stage, dtype, rule):
    """Its loops use fused multiply-adds: masters differ in last bits, and one in some thousand bf16 weights then rounds
    to the next one (2^-8 of up to about 0.1)."""
    for facts in two_ranks.run(cases.host_training, stage, dtype, RULES[rule][0], {}, real=True, timeout_s=400):
        assert facts["kinds"] == ["NoneType", "HostUpdate"]
        assert facts["difference"] < (1e-3 if dtype == "bf16" else 2e-5), facts
