"""SGD and Lion with an 8-bit momentum: how far from float64 they stay."""

import pytest
import torch
from hift_kernels.lion import lion_step
from hift_kernels.lion_int8 import lion_int8_step
from hift_kernels.quantize import GROUP
from hift_kernels.rounding import mixed_seed
from hift_kernels.sgd import sgd_step
from hift_kernels.sgd_int8 import sgd_int8_step
from hift_testing.fused_cases import DEVICE, HYPER, MOMENTS, SIZES, Guarded, Shard, gradient
from hift_testing.reference import LionByHand

STEPS = {"sgd": (sgd_step, sgd_int8_step), "lion": (lion_step, lion_int8_step)}
NESTEROV = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.01, "nesterov": True}


def fp32(rule, numel, num_steps, hyper, decades=3.0, start=None):
    shard = Shard("fp32", numel, MOMENTS[rule], start=start)
    for step in range(num_steps):
        shard.step(STEPS[rule][0], gradient(numel, step, decades=decades), hyper, lr=1e-3, quick=True)
    return shard


def int8(rule, numel, num_steps, hyper, form="fp32", decades=3.0, start=None):
    shard, slot = Shard(form, numel, (), start=start), MOMENTS[rule][0]
    codes = Guarded(torch.zeros(numel, dtype=torch.uint8))
    scales = Guarded(torch.zeros(-(-numel // GROUP)))
    state = {slot: codes.tensor, f"{slot}_scale": scales.tensor}
    for step in range(num_steps):
        grad = gradient(numel, step, decades=decades)
        shard.step(STEPS[rule][1], grad, hyper, lr=1e-3, seed=mixed_seed(1, step), quick=True, **state)
    assert codes.is_whole() and scales.is_whole()
    return shard, state


@pytest.mark.parametrize("rule", STEPS)
@pytest.mark.parametrize("numel", SIZES)
def test_every_length_is_updated_to_its_end_and_not_beyond(rule, numel):
    shard, state = int8(rule, numel, 3, HYPER[rule])
    assert torch.equal(shard.weight.tensor, shard.master.tensor.bfloat16())
    assert bool((shard.master_fp32() != shard.start).all())
    assert all(bool((tensor != 0).any()) for tensor in state.values()) or numel == 0


@pytest.mark.parametrize("rule", STEPS)
def test_split16_is_an_fp32_master_bit_by_bit(rule):
    start = torch.randn(1000, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    full, state = int8(rule, 1000, 5, HYPER[rule], start=start)
    split, other = int8(rule, 1000, 5, HYPER[rule], "split16", start=start)
    assert torch.equal(full.master_fp32(), split.master_fp32())
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("hyper", [HYPER["sgd"], NESTEROV, {**HYPER["sgd"], "dampening": 0.5}], ids=str)
def test_the_first_step_of_sgd_is_the_fp32_kernel_s_and_leaves_the_gradient_undamped(hyper):
    shard, state = int8("sgd", 3 * GROUP, 1, hyper)
    assert torch.equal(shard.master_fp32(), fp32("sgd", 3 * GROUP, 1, hyper).master_fp32())
    largest = (gradient(3 * GROUP, 0, decades=3.0) + 0.01 * shard.start).abs().view(3, GROUP).amax(dim=1)
    assert torch.equal(state["momentum_buffer_scale"].cpu(), largest)


def float64(rule, numel, num_steps, hyper, decades, start):
    param = torch.nn.Parameter(start.double())
    if rule == "sgd":
        optimizer = torch.optim.SGD([param], lr=1e-3, foreach=False, **hyper)
    else:
        optimizer = LionByHand([param], lr=1e-3, betas=(hyper["beta1"], hyper["beta2"]), weight_decay=0.01)
    for step in range(num_steps):
        param.grad = gradient(numel, step, decades=decades).double()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize(
    ("rule", "hyper", "decades", "off"),
    [
        ("sgd", HYPER["sgd"], 6.0, 0.05), ("sgd", NESTEROV, 6.0, 0.05),
        ("lion", HYPER["lion"], 3.0, 0.25), ("lion", HYPER["lion"], 6.0, 0.65),
    ],
)  # fmt: skip
def test_200_steps_stay_near_float64(rule, hyper, decades, off):
    """Lion's sign turns a small error of a small momentum into a whole step."""
    shard, _ = int8(rule, 1024, 200, hyper, decades=decades)
    exact = float64(rule, 1024, 200, hyper, decades, shard.start)
    moved, error = exact - shard.start.double(), shard.master_fp32().double() - exact
    assert error.norm() < off * moved.norm()


@pytest.mark.parametrize("rule", STEPS)
def test_a_gradient_that_is_not_finite_stores_nothing(rule):
    shard, state = int8(rule, 1000, 2, HYPER[rule])
    before = [tensor.clone() for tensor in (*shard.snapshot(), *state.values())]
    grad = gradient(1000, 3)
    grad[999] = float("inf")
    shard.step(STEPS[rule][1], grad, HYPER[rule], lr=1e-3, **state)
    assert all(torch.equal(a, b) for a, b in zip(before, (*shard.snapshot(), *state.values()), strict=True))


@pytest.mark.parametrize("rule", STEPS)
def test_what_does_not_fit_is_refused(rule):
    shard, slot = Shard("fp32", 300, ()), MOMENTS[rule][0]
    fits = {slot: torch.zeros(300, dtype=torch.uint8), f"{slot}_scale": torch.zeros(2)}
    bad = {slot: torch.zeros(300), f"{slot}_scale": torch.zeros(1)}
    for name, sentence in ((slot, f"{slot}.dtype"), (f"{slot}_scale", rf"{slot}_scale\.shape=\(1,\): must be .* of 2")):
        state = {key: value.to(DEVICE) for key, value in {**fits, name: bad[name]}.items()}
        with pytest.raises(ValueError, match=sentence):
            shard.step(STEPS[rule][1], gradient(300, 0), HYPER[rule], lr=1e-3, **state)
