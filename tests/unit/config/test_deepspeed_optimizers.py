"""The real optimizer objects of DeepSpeed: recognised, and our rule does what they do. Each compiles a C++ op first."""

import pytest
import torch
from hift_testing.compiled import BUILDERS, compile_operator

from hift_ds.config.optimizers import rule_from_optimizer

pytestmark = pytest.mark.slow

NUMEL, NUM_STEPS = 4099, 20
# Their vectorized loops use fused multiply-adds and another order of operations: some last bits of fp32.
RELATIVE, ABSOLUTE = 2e-6, 1e-7


@pytest.fixture(autouse=True, scope="module")
def compiled():
    for name in BUILDERS:
        compile_operator(name)


def _cpu_adam(params, **hyper):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, **hyper)


def _fused_adam(params, **hyper):
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(params, **hyper)


def _cpu_adagrad(params, **hyper):
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

    return DeepSpeedCPUAdagrad(params, **hyper)


def _cpu_lion(params, **hyper):
    from deepspeed.ops.lion import DeepSpeedCPULion

    return DeepSpeedCPULion(params, **hyper)


CASES = [
    (_cpu_adam, {"weight_decay": 0.1}, "adamw"),
    (_cpu_adam, {"weight_decay": 0.1, "adamw_mode": False}, "adam"),
    (_cpu_adam, {"bias_correction": False, "betas": (0.8, 0.95)}, "adamw"),
    (_fused_adam, {"weight_decay": 0.1}, "adamw"),
    (_cpu_adagrad, {"weight_decay": 0.1, "eps": 1e-6}, "adagrad"),
    (_cpu_lion, {"weight_decay": 0.1, "betas": (0.9, 0.99)}, "lion"),
]


@pytest.mark.parametrize(("build", "hyper", "name"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_our_rule_does_what_deepspeed_s_optimizer_does(build, hyper, name):
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(NUMEL, generator=generator))
    start = param.detach().clone()
    optimizer = build([param], lr=1e-3, **hyper)
    rule, group = rule_from_optimizer(optimizer), optimizer.param_groups[0]
    assert rule.name == name
    master = start.clone()
    state = {slot: torch.full_like(master, rule.initial_value(slot, group)) for slot in rule.slots(group)}
    for step in range(1, NUM_STEPS + 1):
        grad = torch.randn(NUMEL, generator=generator)
        param.grad = grad.clone()
        optimizer.step()
        rule.update(master, grad.clone(), state, group, lr=1e-3, step=step)
    assert (master - start).abs().min() > 0
    torch.testing.assert_close(param.detach(), master, rtol=RELATIVE, atol=ABSOLUTE)
