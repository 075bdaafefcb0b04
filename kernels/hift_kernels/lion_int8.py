"""Lion with its momentum as 8-bit codes (`hift_kernels.quantize`), in one pass over a flat shard."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hift_kernels.launching import Weights, check_update
from hift_kernels.lion import lion_math
from hift_kernels.quantize import check_codes, decode_signed, encode_signed, groups_of, launch_groups, load_codes
from hift_kernels.rounding import load_master, random32, store_mask, store_master, widen
from hift_kernels.scalars import DECAY, FOUND_INF, RATE, SCALE


@triton.jit(do_not_specialize=["seed"])
def _lion_int8_kernel(
    grad_ptr, weight_ptr, master_ptr, exp_avg_ptr, exp_avg_scale_ptr, scalars_ptr, numel, seed,
    beta1, one_minus_beta1, beta2, one_minus_beta2,
    MASTER: tl.constexpr, INTERPRETED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    rows, offsets, row_mask, mask = groups_of(numel, ROWS, GROUP)
    # load
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    old = load_master(weight_ptr, master_ptr, offsets, mask, MASTER)
    code, largest = load_codes(exp_avg_ptr, exp_avg_scale_ptr, offsets, rows, mask, row_mask)
    scale = tl.load(scalars_ptr + SCALE)
    found_inf = tl.load(scalars_ptr + FOUND_INF)
    decay = tl.load(scalars_ptr + DECAY)
    rate = tl.load(scalars_ptr + RATE)
    # compute
    exp_avg = decode_signed(code, largest)
    new, exp_avg = lion_math(
        old, widen(grad) * scale, exp_avg, decay, rate, beta1, one_minus_beta1, beta2, one_minus_beta2
    )
    largest = tl.max(tl.abs(exp_avg), axis=1)
    code = encode_signed(exp_avg, largest)
    bits = random32(offsets, seed, 0)
    # store
    stored = store_mask(mask, offsets, found_inf)
    store_master(weight_ptr, master_ptr, offsets, old, new, bits & 0xFFFF, mask, stored, MASTER, INTERPRETED)
    tl.store(exp_avg_ptr + offsets, code.to(tl.uint8), mask=stored)
    tl.store(exp_avg_scale_ptr + rows, largest, mask=store_mask(row_mask, rows, found_inf))


def lion_int8_step(
    grad: torch.Tensor,
    weights: Weights,
    exp_avg: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    scalars: torch.Tensor,
    *,
    beta1: float,
    beta2: float,
    seed: int = 0,
) -> None:
    """`lion.lion_step` with the momentum as 8-bit codes, in place.

    Moves per parameter: the gradient, what `Weights` says, 1 + 1 bytes of codes and 8 / 256 of scales: 14.03 bytes with
    an fp32 master and bf16 gradients and weights. Keeps 1.02 bytes of momentum.

    Args:
        grad: bf16, fp16 or fp32, 1-D, as reduced (scaled, not clipped).
        exp_avg: uint8 codes, as long; sign in the highest bit. Zeros at first.
        exp_avg_scale: fp32, one per GROUP elements, the last group may be shorter. Zeros at first.
        scalars: From `grad_norm.prepare`.
        seed: Draws the stochastic rounding of a master of form "none".

    Raises:
        ValueError: A tensor of another dtype, length, device or stride.
    """
    check_update(grad, weights, scalars)
    check_codes(exp_avg, exp_avg_scale, "exp_avg", grad.numel(), grad.device)
    launch_groups(
        _lion_int8_kernel, grad.numel(), grad.device,
        grad, weights.weight, weights.second, exp_avg, exp_avg_scale, scalars, grad.numel(), seed,
        beta1, 1 - beta1, beta2, 1 - beta2, MASTER=weights.constexpr,
    )  # fmt: skip
