"""hift_kernels.rounding: each helper by itself, in kernels made for it."""

import numpy as np
import torch
import triton
import triton.language as tl
from hift_kernels.rounding import INTERPRET, bf16_nearest, bf16_stochastic, mixed_seed, random32, widen
from hift_testing.fused_cases import DEVICE


@triton.jit
def _nearest_kernel(x_ptr, out_ptr, INTERPRETED: tl.constexpr, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    tl.store(out_ptr + offsets, bf16_nearest(tl.load(x_ptr + offsets), INTERPRETED))


@triton.jit
def _stochastic_kernel(x_ptr, out_ptr, seed, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    bits = random32(offsets, seed, 0)
    tl.store(out_ptr + offsets, bf16_stochastic(tl.load(x_ptr + offsets), bits & 0xFFFF))


@triton.jit
def _widen_kernel(x_ptr, out_ptr, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    tl.store(out_ptr + offsets, widen(tl.load(x_ptr + offsets)))


@triton.jit
def _random_kernel(out_ptr, seed, STREAM: tl.constexpr, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    tl.store(out_ptr + offsets, random32(offsets, seed, STREAM).to(tl.int32, bitcast=True))


def draws(seed: int, stream: int = 0, numel: int = 1 << 16) -> np.ndarray:
    out = torch.zeros(numel, dtype=torch.int32, device=DEVICE)
    _random_kernel[(1,)](out, seed, STREAM=stream, TILE=numel, num_warps=32)
    return out.cpu().numpy().view(np.uint32)


def rounded(x: torch.Tensor, seed: int) -> torch.Tensor:
    out = torch.zeros(x.numel(), dtype=torch.bfloat16, device=DEVICE)
    _stochastic_kernel[(1,)](x.to(DEVICE), out, seed, TILE=x.numel(), num_warps=32)
    return out.cpu()


def test_nearest_equals_torch_for_values_ties_and_specials():
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 16,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    bits[:1000] = (bits[:1000] & -65536) | 0x8000  # exact ties
    x = bits.view(torch.float32)
    x[1000:1004] = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0])
    out = torch.zeros(x.numel(), dtype=torch.bfloat16, device=DEVICE)
    _nearest_kernel[(1,)](x.to(DEVICE), out, INTERPRETED=INTERPRET, TILE=x.numel(), num_warps=32)
    out = out.cpu()
    known = ~x.isnan()
    assert torch.equal(out[known].view(torch.int16), x.bfloat16()[known].view(torch.int16))
    assert out[~known].isnan().all()


def test_every_bf16_widens_to_its_value_denormals_too():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.zeros(x.numel(), device=DEVICE)
    _widen_kernel[(1,)](x.to(DEVICE), out, TILE=x.numel(), num_warps=32)
    out = out.cpu()
    expected = (x.view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    assert torch.equal(out.view(torch.int32)[~x.isnan()], expected.view(torch.int32)[~x.isnan()])
    assert out[x.isnan()].isnan().all()


def test_stochastic_rounding_is_unbiased():
    """4 million draws of a value 0.3 of the way up: the share that goes up is 0.3 within 4 standard deviations."""
    low, spacing = 1.0, 2.0**-7
    x = torch.full((1 << 16,), low + 0.3 * spacing)
    up = sum((rounded(x, mixed_seed(5, step)).double() > low).double().mean().item() for step in range(64)) / 64
    assert abs(up - 0.3) < 4 * (0.3 * 0.7 / (64 * (1 << 16))) ** 0.5


def test_stochastic_rounding_takes_one_of_the_two_neighbours():
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    result = rounded(x, mixed_seed(1, 2)).float()
    toward_zero = (x.view(torch.int32) & -65536).view(torch.float32)
    away = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((result == toward_zero) | (result == away)).all()
    assert 0.4 < (result == away).float().mean() < 0.6


def test_stochastic_rounding_keeps_what_bf16_holds_and_inf_and_nan():
    payload_in_the_low_half = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    values = [1.0, -0.5, 0.0, -0.0, float("inf"), float("-inf"), float("nan")]
    x = torch.cat([torch.tensor(values), payload_in_the_low_half])
    result = rounded(x, mixed_seed(3)).float()
    assert torch.equal(result[:6].view(torch.int32), x[:6].view(torch.int32))
    assert result[6:].isnan().all()


def test_draws_are_uniform_and_do_not_follow_from_neighbours_or_steps():
    first, second = draws(mixed_seed(42, 0)) / 2.0**32, draws(mixed_seed(42, 1)) / 2.0**32
    for values in (first, second):
        assert abs(values.mean() - 0.5) < 4 * (1 / 12 / values.size) ** 0.5
        assert abs(values.std() - 12**-0.5) < 3e-3
    other = draws(mixed_seed(42, 0), stream=1) / 2.0**32
    bound = 4 / first.size**0.5
    for a, b in ((first, second), (first, other), (first[1:], first[:-1]), (second[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < bound


def test_seeds_differ_for_each_step_block_and_rank_and_fit_an_int32():
    seeds = {mixed_seed(42, step, block, rank) for step in range(50) for block in range(20) for rank in range(4)}
    assert len(seeds) == 4000
    assert all(-(2**31) <= seed < 2**31 for seed in seeds)
    assert mixed_seed(1, 2) != mixed_seed(2, 1)
