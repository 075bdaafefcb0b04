"""Adagrad in one pass over a flat shard."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hift_kernels.launching import Weights, check_update, launch
from hift_kernels.rounding import load_master, random32, store_mask, store_master, store_rounded, widen
from hift_kernels.scalars import FOUND_INF, RATE, SCALE, STEP


@triton.jit(do_not_specialize=["seed"])
def _adagrad_kernel(
    grad_ptr, weight_ptr, master_ptr, sum_ptr, scalars_ptr, numel, seed, eps, weight_decay, lr_decay,
    MASTER: tl.constexpr, INTERPRETED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offsets < numel
    # load
    grad = tl.load(grad_ptr + offsets, mask=mask)
    old = load_master(weight_ptr, master_ptr, offsets, mask, MASTER)
    total = tl.load(sum_ptr + offsets, mask=mask)
    scale = tl.load(scalars_ptr + SCALE)
    found_inf = tl.load(scalars_ptr + FOUND_INF)
    rate = tl.load(scalars_ptr + RATE)
    step = tl.load(scalars_ptr + STEP)
    # compute
    rate = tl.div_rn(rate, 1.0 + (step - 1.0) * lr_decay)
    grad = widen(grad) * scale + weight_decay * old
    total = widen(total) + grad * grad
    new = old - rate * tl.div_rn(grad, tl.sqrt_rn(total) + eps)
    bits = random32(offsets, seed, 0)
    # store
    stored = store_mask(mask, offsets, found_inf)
    store_master(weight_ptr, master_ptr, offsets, old, new, bits & 0xFFFF, mask, stored, MASTER, INTERPRETED)
    store_rounded(sum_ptr + offsets, total, stored, bits >> 16, True, INTERPRETED)


def adagrad_step(
    grad: torch.Tensor,
    weights: Weights,
    accumulator: torch.Tensor,
    scalars: torch.Tensor,
    *,
    eps: float,
    weight_decay: float = 0.0,
    lr_decay: float = 0.0,
    seed: int = 0,
) -> None:
    """Unscale, clip, weight decay, sum of squares, master and model weights in one pass, in place.

    Moves per parameter: the gradient, what `Weights` says and 4 + 4 bytes of an fp32 sum: 20 bytes with an fp32 master
    and bf16 gradients and weights. Keeps 4.

    Source: torch.optim.Adagrad; Duchi, Hazan and Singer, JMLR 12 (2011).

    Args:
        grad: bf16, fp16 or fp32, 1-D, as reduced (scaled, not clipped). All others are as long.
        accumulator: Sum of squared gradients, fp32 or bf16.
        scalars: From `grad_norm.prepare`.
        seed: Draws the stochastic rounding.

    Raises:
        ValueError: A tensor of another dtype, length, device or stride.
    """
    check_update(grad, weights, scalars, accumulator=accumulator)
    launch(
        _adagrad_kernel, grad.numel(), grad.device,
        grad, weights.weight, weights.second, accumulator, scalars, grad.numel(), seed, eps, weight_decay, lr_decay,
        MASTER=weights.constexpr,
    )  # fmt: skip
