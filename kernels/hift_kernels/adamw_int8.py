"""AdamW with 8-bit moments (`hift_kernels.quantize`), in one pass over a flat shard.

The code of the second moment is at least 1 where the moment is not 0, which the source does not have. Without that an
element much smaller than its neighbours is divided by eps alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hift_kernels.adamw import adam_math
from hift_kernels.launching import Weights, check_update
from hift_kernels.quantize import (
    check_codes,
    decode,
    decode_signed,
    encode,
    encode_signed,
    fraction_of,
    groups_of,
    launch_groups,
    load_codes,
)
from hift_kernels.rounding import load_master, random32, store_mask, store_master, widen
from hift_kernels.scalars import DECAY, FOUND_INF, INV_SQRT_BC2, SCALE, STEP_SIZE


@triton.jit(do_not_specialize=["seed"])
def _adamw_int8_kernel(
    grad_ptr, weight_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, exp_avg_scale_ptr, exp_avg_sq_scale_ptr, scalars_ptr,
    numel, seed, one_minus_beta1, one_minus_beta2, eps, weight_decay,
    DECOUPLED: tl.constexpr, MASTER: tl.constexpr, INTERPRETED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    rows, offsets, row_mask, mask = groups_of(numel, ROWS, GROUP)
    # load
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    old = load_master(weight_ptr, master_ptr, offsets, mask, MASTER)
    code1, largest1 = load_codes(exp_avg_ptr, exp_avg_scale_ptr, offsets, rows, mask, row_mask)
    code2, largest2 = load_codes(exp_avg_sq_ptr, exp_avg_sq_scale_ptr, offsets, rows, mask, row_mask)
    scale = tl.load(scalars_ptr + SCALE)
    found_inf = tl.load(scalars_ptr + FOUND_INF)
    step_size = tl.load(scalars_ptr + STEP_SIZE)
    inv_sqrt_bc2 = tl.load(scalars_ptr + INV_SQRT_BC2)
    decay = tl.load(scalars_ptr + DECAY)
    # compute
    exp_avg = decode_signed(code1, largest1)
    exp_avg_sq = decode(code2, 1) * largest2
    new, exp_avg, exp_avg_sq = adam_math(
        old, widen(grad) * scale, exp_avg, exp_avg_sq, step_size, inv_sqrt_bc2, decay,
        one_minus_beta1, one_minus_beta2, eps, weight_decay, DECOUPLED,
    )  # fmt: skip
    # What lies behind the end was loaded as 0, but a master there is undefined.
    exp_avg = tl.where(mask, exp_avg, 0.0)
    exp_avg_sq = tl.where(mask, exp_avg_sq, 0.0)
    # Both before either is encoded: with Triton 3.6 the other order costs 27 registers.
    largest1 = tl.max(tl.abs(exp_avg), axis=1)
    largest2 = tl.max(exp_avg_sq, axis=1)
    code1 = encode_signed(exp_avg, largest1)
    code2 = encode(fraction_of(exp_avg_sq, largest2[:, None]), 1)
    code2 = tl.where((exp_avg_sq > 0.0) & (code2 == 0), 1, code2)
    bits = random32(offsets, seed, 0)
    # store
    stored = store_mask(mask, offsets, found_inf)
    row_mask = store_mask(row_mask, rows, found_inf)
    store_master(weight_ptr, master_ptr, offsets, old, new, bits & 0xFFFF, mask, stored, MASTER, INTERPRETED)
    tl.store(exp_avg_ptr + offsets, code1.to(tl.uint8), mask=stored)
    tl.store(exp_avg_sq_ptr + offsets, code2.to(tl.uint8), mask=stored)
    tl.store(exp_avg_scale_ptr + rows, largest1, mask=row_mask)
    tl.store(exp_avg_sq_scale_ptr + rows, largest2, mask=row_mask)


def adamw_int8_step(
    grad: torch.Tensor,
    weights: Weights,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
    scalars: torch.Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    seed: int = 0,
) -> None:
    """`adamw.adamw_step` with both moments as 8-bit codes, in place.

    Moves per parameter: the gradient, what `Weights` says, 2 + 2 bytes of codes and 16 / 256 of scales: 16.1 bytes with
    an fp32 master and bf16 gradients and weights. Keeps 2.03 bytes of moments.

    Args:
        grad: bf16, fp16 or fp32, 1-D, as reduced (scaled, not clipped).
        exp_avg: uint8 codes, as long; sign in the highest bit. Zeros at first.
        exp_avg_sq: uint8 codes, as long. Zeros at first.
        exp_avg_scale: fp32, one per GROUP elements, the last group may be shorter. Zeros at first.
        exp_avg_sq_scale: fp32, one per GROUP elements. Zeros at first.
        scalars: From `grad_norm.prepare` with `bias_correction` and the same hyper-parameters.
        seed: Draws the stochastic rounding of a master of form "none".

    Raises:
        ValueError: A tensor of another dtype, length, device or stride.
    """
    check_update(grad, weights, scalars)
    check_codes(exp_avg, exp_avg_scale, "exp_avg", grad.numel(), grad.device)
    check_codes(exp_avg_sq, exp_avg_sq_scale, "exp_avg_sq", grad.numel(), grad.device)
    launch_groups(
        _adamw_int8_kernel, grad.numel(), grad.device,
        grad, weights.weight, weights.second, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, scalars,
        grad.numel(), seed, 1 - beta1, 1 - beta2, eps, weight_decay, DECOUPLED=decoupled, MASTER=weights.constexpr,
    )  # fmt: skip
