"""hift_kernels.grad_norm: the norm, and what `prepare` makes of it on the device."""

import numpy as np
import pytest
import torch
from hift_kernels.grad_norm import STEP, prepare, sum_of_squares
from hift_kernels.launching import NUM_SCALARS, fp64_halves
from hift_testing import fused_oracle
from hift_testing.fused_cases import DEVICE, DTYPES, SIZES, fp64

NAMES = ("scale", "found_inf", "step_size", "inv_sqrt_bc2", "decay", "rate", "norm", "step")


def squares_of(grad: torch.Tensor) -> float:
    result = fp64(5.0)
    sum_of_squares(grad.to(DEVICE), result)
    return result.item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [*SIZES, 200_000])
def test_sum_of_squares_is_that_of_float64(dtype, numel):
    grad = (torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * 1e-3).to(DTYPES[dtype])
    exact = grad.double().square().sum().item()
    assert abs(squares_of(grad) - exact) <= 1e-7 * exact
    assert (exact > 0) == (numel > 0)


def test_sum_of_squares_is_the_same_bits_each_time():
    grad = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    assert len({squares_of(grad) for _ in range(3)}) == 1


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 70_000, 199_999])
def test_one_inf_or_nan_anywhere_shows(bad, place):
    grad = torch.zeros(200_000)
    grad[place] = bad
    assert not np.isfinite(squares_of(grad))


def test_shards_add_up():
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (100, 0, 5000)]
    result = fp64(0.0)
    for grad in grads:
        sum_of_squares(grad.to(DEVICE), result, accumulate=True)
    exact = sum(grad.double().square().sum().item() for grad in grads)
    assert abs(result.item() - exact) <= 1e-7 * exact


def prepared(square: float, divisor: float, scalars: torch.Tensor, **hyper) -> dict[str, float]:
    prepare(fp64(square), fp64(divisor), scalars, **hyper)
    return dict(zip(NAMES, scalars.tolist(), strict=False))


HYPER = {"lr": 3.3e-4, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "bias_correction": True}


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 50.0])
@pytest.mark.parametrize("step", [0, 1, 2, 9, 99, 4095, 99_999])
def test_scalars_are_python_s_fp64_rounded_to_fp32(step, max_norm):
    scalars = torch.zeros(NUM_SCALARS, device=DEVICE)
    scalars[STEP] = step
    found = prepared(7.3, 1024.0, scalars, max_norm=max_norm, **HYPER)
    expected = fused_oracle.scalars(7.3, 1024.0, step, max_norm=max_norm, **HYPER)
    for name, value in expected.items():
        # fp64_halves leaves 2^-48 of each number, which 1 - beta2 at step 1 makes 2^-38: below half an fp32 spacing.
        assert abs(found[name] - np.float32(value)) <= np.spacing(np.float32(value)), name


def test_the_clip_coefficient_is_torch_s():
    grad = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    param = torch.nn.Parameter(torch.zeros(1000))
    param.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_([param], 0.5)
    found = prepared(squares_of(grad * 8), 8.0, torch.zeros(NUM_SCALARS, device=DEVICE), max_norm=0.5, lr=1.0)
    assert found["norm"] == pytest.approx(norm.item(), rel=1e-6)
    assert torch.allclose(grad * 8 * found["scale"], param.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("square", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_is_found_and_the_step_does_not_count(square):
    scalars = torch.zeros(NUM_SCALARS, device=DEVICE)
    scalars[STEP] = 4
    found = prepared(square, 1.0, scalars, max_norm=1.0, **HYPER)
    assert (found["found_inf"], found["step"]) == (1.0, 4.0)
    found = prepared(1.0, 1.0, scalars, max_norm=1.0, **HYPER)
    assert (found["found_inf"], found["step"]) == (0.0, 5.0)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.999, 1 - 1e-12, 1e-5, 3.3e-4, 12345.678])
def test_two_fp32_halves_hold_48_bits(value):
    high, low = fp64_halves(value)
    assert np.float32(high) == high and np.float32(low) == low
    assert abs(high + low - value) <= 2.0**-48 * abs(value)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"result\.dtype=torch\.float32: must be torch\.float64"):
        sum_of_squares(torch.zeros(16), torch.zeros(1))
    with pytest.raises(ValueError, match=r"grad\.shape=\(2, 4\): must be contiguous, 1-D"):
        sum_of_squares(torch.zeros(2, 4), torch.zeros(1, dtype=torch.float64))
