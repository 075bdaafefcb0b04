"""AdamW (and Adam with L2) in one pass over a flat shard."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hift_kernels.launching import Weights, check_update, launch
from hift_kernels.rounding import load_master, random32, store_mask, store_master, store_rounded, widen
from hift_kernels.scalars import DECAY, FOUND_INF, INV_SQRT_BC2, SCALE, STEP_SIZE


@triton.jit
def adam_math(
    master, grad, exp_avg, exp_avg_sq, step_size, inv_sqrt_bc2, decay,
    one_minus_beta1, one_minus_beta2, eps, weight_decay, DECOUPLED: tl.constexpr,
):  # fmt: skip
    """One step in fp32, each operation rounded once: no contraction, IEEE division and square root."""
    if DECOUPLED:
        master = master * decay
    else:
        grad = grad + weight_decay * master
    exp_avg = exp_avg + one_minus_beta1 * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq + one_minus_beta2 * (grad * grad - exp_avg_sq)
    denominator = tl.sqrt_rn(exp_avg_sq) * inv_sqrt_bc2 + eps
    master = master - step_size * tl.div_rn(exp_avg, denominator)
    return master, exp_avg, exp_avg_sq


@triton.jit(do_not_specialize=["seed"])
def _adamw_kernel(
    grad_ptr, weight_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, numel, seed,
    one_minus_beta1, one_minus_beta2, eps, weight_decay,
    DECOUPLED: tl.constexpr, MASTER: tl.constexpr, INTERPRETED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offsets < numel
    # load
    grad = tl.load(grad_ptr + offsets, mask=mask)
    old = load_master(weight_ptr, master_ptr, offsets, mask, MASTER)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask)
    scale = tl.load(scalars_ptr + SCALE)
    found_inf = tl.load(scalars_ptr + FOUND_INF)
    step_size = tl.load(scalars_ptr + STEP_SIZE)
    inv_sqrt_bc2 = tl.load(scalars_ptr + INV_SQRT_BC2)
    decay = tl.load(scalars_ptr + DECAY)
    # compute
    new, exp_avg, exp_avg_sq = adam_math(
        old, widen(grad) * scale, widen(exp_avg), widen(exp_avg_sq), step_size, inv_sqrt_bc2, decay,
        one_minus_beta1, one_minus_beta2, eps, weight_decay, DECOUPLED,
    )  # fmt: skip
    bits = random32(offsets, seed, 0)
    more_bits = random32(offsets, seed, 1)
    # store
    stored = store_mask(mask, offsets, found_inf)
    store_master(weight_ptr, master_ptr, offsets, old, new, bits & 0xFFFF, mask, stored, MASTER, INTERPRETED)
    store_rounded(exp_avg_ptr + offsets, exp_avg, stored, bits >> 16, True, INTERPRETED)
    store_rounded(exp_avg_sq_ptr + offsets, exp_avg_sq, stored, more_bits & 0xFFFF, True, INTERPRETED)


def adamw_step(
    grad: torch.Tensor,
    weights: Weights,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    seed: int = 0,
) -> None:
    """Unscale, clip, moments, weight decay, bias correction, master weights and model weights in one pass, in place.

    Moves per parameter: the gradient (2 bytes in bf16), 8 + 8 of fp32 moments (4 + 4 of bf16) and what `Weights` says:
    28 bytes with an fp32 master, fp32 moments and bf16 gradients and weights. Keeps 8 (4) of moments. Nothing is stored
    where `scalars` says that a gradient is not finite.

    Source: arXiv 1412.6980 and 1711.05101; moments in the form m + (1 - beta) (g - m), whose rounding error is smaller.
    The rounding of bf16 moments is stochastic: to nearest, exp_avg_sq would never decay at beta2 = 0.999.

    Args:
        grad: bf16, fp16 or fp32, 1-D, as reduced (scaled, not clipped). All others are as long.
        exp_avg: fp32 or bf16.
        exp_avg_sq: fp32 or bf16.
        scalars: From `grad_norm.prepare` with `bias_correction` and the same hyper-parameters.
        decoupled: AdamW; otherwise weight decay is added to the gradient.
        seed: Draws the stochastic rounding; a new, well mixed one at every step (`mixed_seed`).

    Raises:
        ValueError: A tensor of another dtype, length, device or stride.
    """
    check_update(grad, weights, scalars, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    launch(
        _adamw_kernel, grad.numel(), grad.device,
        grad, weights.weight, weights.second, exp_avg, exp_avg_sq, scalars, grad.numel(), seed,
        1 - beta1, 1 - beta2, eps, weight_decay,
        DECOUPLED=decoupled, MASTER=weights.constexpr,
    )  # fmt: skip
