"""AdamW with 8-bit moments: the code, and how far from float64 it stays."""

import pytest
import torch
import triton
import triton.language as tl
from hift_kernels.adamw_int8 import adamw_int8_step
from hift_kernels.quantize import GROUP, decode, encode
from hift_kernels.rounding import mixed_seed
from hift_testing.fused_cases import DEVICE, GUARD, HYPER, SIZES, Shard, gradient

NUM_CODES = (128, 255)  # magnitudes of the first (signed) and of the second moment


@triton.jit
def _round_trip_kernel(code_ptr, value_ptr, again_ptr, EXTRA: tl.constexpr, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    value = decode(tl.load(code_ptr + offsets), EXTRA)
    tl.store(value_ptr + offsets, value)
    tl.store(again_ptr + offsets, encode(value, EXTRA))


@triton.jit
def _encode_kernel(value_ptr, code_ptr, EXTRA: tl.constexpr, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    tl.store(code_ptr + offsets, encode(tl.load(value_ptr + offsets), EXTRA))


def values(extra: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each code's value, and the code that the value gets."""
    codes = torch.arange(128 << extra, dtype=torch.int32, device=DEVICE)
    value, again = torch.zeros(codes.numel(), device=DEVICE), torch.zeros_like(codes)
    _round_trip_kernel[(1,)](codes, value, again, EXTRA=extra, TILE=codes.numel())
    return value[: NUM_CODES[extra]].cpu(), again[: NUM_CODES[extra]].cpu()


def new_state(numel: int) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    groups = -(-numel // GROUP)
    codes = [torch.cat([torch.zeros(numel), torch.full((GUARD,), 77.0)]).to(DEVICE, torch.uint8) for _ in range(2)]
    scales = [torch.cat([torch.zeros(groups), torch.full((GUARD,), 77.0)]).to(DEVICE) for _ in range(2)]
    state = {
        "exp_avg": codes[0][:numel], "exp_avg_sq": codes[1][:numel],
        "exp_avg_scale": scales[0][:groups], "exp_avg_sq_scale": scales[1][:groups],
    }  # fmt: skip
    return state, [*codes, *scales]


def train(
    numel: int, num_steps: int, form: str = "fp32", decades: float = 3.0, start: torch.Tensor | None = None
) -> tuple[Shard, dict[str, torch.Tensor]]:
    shard = Shard(form, numel, (), start=start)
    state, guarded = new_state(numel)
    for step in range(num_steps):
        grad = gradient(numel, step, decades=decades)
        shard.step(adamw_int8_step, grad, HYPER["adamw"], lr=1e-3, seed=mixed_seed(1, step), quick=True, **state)
    assert all(bool((whole[-GUARD:] == 77).all()) for whole in guarded)
    return shard, state


def float64(numel: int, num_steps: int, start: torch.Tensor, decades: float = 3.0) -> torch.Tensor:
    param = torch.nn.Parameter(start.double())
    optimizer = torch.optim.AdamW([param], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, foreach=False)
    for step in range(num_steps):
        param.grad = gradient(numel, step, decades=decades).double()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("extra", [0, 1])
def test_every_code_decodes_to_a_value_of_its_own_that_encodes_to_it(extra):
    value, again = values(extra)
    assert torch.equal(again, torch.arange(NUM_CODES[extra], dtype=torch.int32))
    assert (value.diff() > 0).all()
    assert value[0] == 0 and value[-1] == 1.0


@pytest.mark.parametrize("extra", [0, 1])
def test_the_error_of_a_code_is_at_most_half_the_spacing_of_its_decade(extra):
    x, codes = torch.logspace(-6, 0, 4096), torch.zeros(4096, dtype=torch.int32, device=DEVICE)
    _encode_kernel[(1,)](x.to(DEVICE), codes, EXTRA=extra, TILE=4096)
    value, _ = values(extra)
    decade = torch.stack([x > 10.0**power for power in range(-6, 0)]).sum(dim=0)
    half_spacing = 10.0 ** (decade - 6).double() * 0.45 / 2.0 ** (decade + extra)
    assert ((x - value[codes.cpu().long()]).abs().double() <= half_spacing * 1.0001).all()


@pytest.mark.parametrize("numel", SIZES)
def test_every_length_is_updated_to_its_end_and_not_beyond(numel):
    shard, state = train(numel, 3)
    assert torch.equal(shard.weight.tensor, shard.master.tensor.bfloat16())
    assert bool((shard.master_fp32() != shard.start).all())
    assert bool((state["exp_avg_sq"] > 0).all())


def test_split16_is_an_fp32_master_bit_by_bit():
    start = torch.randn(1000, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    (full, state), (split, other) = (train(1000, 5, form, start=start) for form in ("fp32", "split16"))
    assert torch.equal(full.master_fp32(), split.master_fp32())
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize(("decades", "off", "cosine"), [(3.0, 0.25, 0.97), (6.0, 0.65, 0.78)])
def test_200_steps_stay_near_float64(decades, off, cosine):
    """Where gradients of one group spread over 6 decades, as they do here and hardly in a model, most elements have a
    second moment below the smallest code; its floor keeps their steps too small."""
    shard, _ = train(1024, 200, decades=decades)
    exact = float64(1024, 200, shard.start, decades=decades)
    moved, error = exact - shard.start.double(), shard.master_fp32().double() - exact
    assert error.norm() < off * moved.norm()
    assert torch.cosine_similarity(shard.master_fp32().double() - shard.start.double(), moved, dim=0) > cosine


def test_a_small_element_beside_large_ones_takes_no_giant_step():
    """Without the floor of the code its second moment would be 0, and the step divided by eps."""
    shard, _ = train(GROUP, 60, decades=5.0)
    exact = float64(GROUP, 60, shard.start, decades=5.0)
    largest = (exact - shard.start.double()).abs().max()
    assert (shard.master_fp32().double() - shard.start.double()).abs().max() < 2.5 * largest


def test_a_gradient_that_is_not_finite_stores_nothing():
    shard, state = train(1000, 2)
    before = [tensor.clone() for tensor in (*shard.snapshot(), *state.values())]
    grad = gradient(1000, 3)
    grad[999] = float("nan")
    shard.step(adamw_int8_step, grad, HYPER["adamw"], lr=1e-3, **state)
    assert all(torch.equal(a, b) for a, b in zip(before, (*shard.snapshot(), *state.values()), strict=True))


def test_what_does_not_fit_is_refused():
    shard, (state, _) = Shard("fp32", 300, ()), new_state(300)
    with pytest.raises(ValueError, match=r"exp_avg_scale\.shape=\(1,\): must be contiguous, 1-D, of 2 elements"):
        shard.step(adamw_int8_step, gradient(300, 0), HYPER["adamw"], lr=1e-3,
                   **{**state, "exp_avg_scale": torch.zeros(1, device=DEVICE)})  # fmt: skip
