"""Lion in one pass over a flat shard."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hift_kernels.launching import Weights, check_update, launch
from hift_kernels.rounding import load_master, random32, store_mask, store_master, store_rounded, widen
from hift_kernels.scalars import DECAY, FOUND_INF, RATE, SCALE


@triton.jit
def lion_math(old, grad, exp_avg, decay, rate, beta1, one_minus_beta1, beta2, one_minus_beta2):
    """New master and momentum of an unscaled gradient, all fp32."""
    direction = exp_avg * beta1 + one_minus_beta1 * grad
    sign = tl.where(direction > 0.0, 1.0, tl.where(direction < 0.0, -1.0, 0.0))
    return old * decay - rate * sign, exp_avg * beta2 + one_minus_beta2 * grad


@triton.jit(do_not_specialize=["seed"])
def _lion_kernel(
    grad_ptr, weight_ptr, master_ptr, exp_avg_ptr, scalars_ptr, numel, seed,
    beta1, one_minus_beta1, beta2, one_minus_beta2,
    MASTER: tl.constexpr, INTERPRETED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offsets < numel
    # load
    grad = tl.load(grad_ptr + offsets, mask=mask)
    old = load_master(weight_ptr, master_ptr, offsets, mask, MASTER)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask)
    scale = tl.load(scalars_ptr + SCALE)
    found_inf = tl.load(scalars_ptr + FOUND_INF)
    decay = tl.load(scalars_ptr + DECAY)
    rate = tl.load(scalars_ptr + RATE)
    # compute
    new, exp_avg = lion_math(
        old, widen(grad) * scale, widen(exp_avg), decay, rate, beta1, one_minus_beta1, beta2, one_minus_beta2
    )
    bits = random32(offsets, seed, 0)
    # store
    stored = store_mask(mask, offsets, found_inf)
    store_master(weight_ptr, master_ptr, offsets, old, new, bits & 0xFFFF, mask, stored, MASTER, INTERPRETED)
    store_rounded(exp_avg_ptr + offsets, exp_avg, stored, bits >> 16, True, INTERPRETED)


def lion_step(
    grad: torch.Tensor,
    weights: Weights,
    exp_avg: torch.Tensor,
    scalars: torch.Tensor,
    *,
    beta1: float,
    beta2: float,
    seed: int = 0,
) -> None:
    """Unscale, clip, sign of the interpolated momentum, decay, master and model weights in one pass, in place.

    Moves per parameter: the gradient, what `Weights` says and 4 + 4 bytes of fp32 momentum: 20 bytes with an fp32
    master and bf16 gradients and weights. Keeps 4.

    Source: arXiv 2302.06675, algorithm 2; sign(0) = 0. Weight decay is in `scalars` (DECAY).

    Args:
        grad: bf16, fp16 or fp32, 1-D, as reduced (scaled, not clipped). All others are as long.
        exp_avg: fp32 or bf16.
        scalars: From `grad_norm.prepare`.
        seed: Draws the stochastic rounding.

    Raises:
        ValueError: A tensor of another dtype, length, device or stride.
    """
    check_update(grad, weights, scalars, exp_avg=exp_avg)
    launch(
        _lion_kernel, grad.numel(), grad.device,
        grad, weights.weight, weights.second, exp_avg, scalars, grad.numel(), seed,
        beta1, 1 - beta1, beta2, 1 - beta2, MASTER=weights.constexpr,
    )  # fmt: skip
