"""AdamW with 8-bit moments, quantised block-wise, in one pass over a flat shard.

Each run of `GROUP` elements shares one fp32 scale per moment, the largest magnitude in it. A code is a floating-point
number of seven decades ("dynamic"): decade i = 0..6 holds the values 10^(i-6) (0.1 + 0.9 t / 2^i), t = 1..2^i, so that
the largest has the most codes; one more bit for the second moment, which has no sign. In closed form, without a table.

Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861. Not in it: the code of the second moment is at
least 1 where the moment is not 0. Without that an element much smaller than its neighbours is divided by eps alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hift_kernels.adamw import adam_math
from hift_kernels.launching import GRADIENTS, NUM_SCALARS, Weights, check, launch_one
from hift_kernels.rounding import INTERPRET, load_master, random32, store_mask, store_master, widen
from hift_kernels.scalars import DECAY, FOUND_INF, INV_SQRT_BC2, SCALE, STEP_SIZE

GROUP = 256  # elements that share a scale
_ROWS = 256 if INTERPRET else 2  # groups of one program: 4 elements a thread (8 need 128 registers)
_NUM_WARPS = 4


@triton.jit
def _power_of_ten(decade):
    """10 ** (decade - 6) in fp32, for decades 0 to 6."""
    power = tl.where(decade == 0, 1e-6, 1.0)
    power = tl.where(decade == 1, 1e-5, power)
    power = tl.where(decade == 2, 1e-4, power)
    power = tl.where(decade == 3, 1e-3, power)
    power = tl.where(decade == 4, 1e-2, power)
    return tl.where(decade == 5, 1e-1, power).to(tl.float32)


@triton.jit
def decode(code, EXTRA: tl.constexpr):
    """int32 magnitude codes to fp32 in [0, 1]; EXTRA = 0: 0..127, 1: 0..254."""
    # code - 1 + 2^EXTRA = 2^exponent + t - 1, read off its fp32 representation
    bits = (code + ((1 << EXTRA) - 1)).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    one_code = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    value = _power_of_ten(exponent - EXTRA) * (0.1 + 0.9 * (fraction + one_code))
    return tl.where(code == 0, 0.0, value)


@triton.jit
def encode(value, EXTRA: tl.constexpr):
    """fp32 in [0, 1] to the nearest code of its decade, as int32."""
    decade = (
        (value > 1e-6).to(tl.int32) + (value > 1e-5).to(tl.int32) + (value > 1e-4).to(tl.int32)
        + (value > 1e-3).to(tl.int32) + (value > 1e-2).to(tl.int32) + (value > 1e-1).to(tl.int32)
    )  # fmt: skip
    exponent = decade + EXTRA
    codes = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    place = (tl.div_rn(value, _power_of_ten(decade)) - 0.1) * (1.0 / 0.9) * codes
    code = (1 << exponent) - (1 << EXTRA) + tl.maximum(place + 0.5, 0.0).to(tl.int32)
    return tl.minimum(code, (128 << EXTRA) - (1 << EXTRA))


@triton.jit
def _fraction_of(value, largest):
    """value / largest in [0, 1]; 0 where largest is."""
    divisor = tl.where(largest > 0.0, largest, 1.0)
    return tl.minimum(tl.div_rn(value, value * 0.0 + divisor), 1.0)


@triton.jit(do_not_specialize=["seed"])
def _adamw_int8_kernel(
    grad_ptr, weight_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, exp_avg_scale_ptr, exp_avg_sq_scale_ptr, scalars_ptr,
    numel, seed, one_minus_beta1, one_minus_beta2, eps, weight_decay,
    DECOUPLED: tl.constexpr, MASTER: tl.constexpr, INTERPRETED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = offsets < numel
    row_mask = rows * GROUP < numel
    # load
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    old, compensation = load_master(weight_ptr, master_ptr, offsets, mask, MASTER)
    code1 = tl.load(exp_avg_ptr + offsets, mask=mask, other=0).to(tl.int32)
    code2 = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0).to(tl.int32)
    largest1 = tl.load(exp_avg_scale_ptr + rows, mask=row_mask, other=0.0)[:, None]
    largest2 = tl.load(exp_avg_sq_scale_ptr + rows, mask=row_mask, other=0.0)[:, None]
    scale = tl.load(scalars_ptr + SCALE)
    found_inf = tl.load(scalars_ptr + FOUND_INF)
    step_size = tl.load(scalars_ptr + STEP_SIZE)
    inv_sqrt_bc2 = tl.load(scalars_ptr + INV_SQRT_BC2)
    decay = tl.load(scalars_ptr + DECAY)
    # compute
    exp_avg = decode(code1 & 127, 0) * largest1
    exp_avg = tl.where(code1 > 127, -exp_avg, exp_avg)
    exp_avg_sq = decode(code2, 1) * largest2
    new, exp_avg, exp_avg_sq = adam_math(
        old, widen(grad) * scale, exp_avg, exp_avg_sq, step_size, inv_sqrt_bc2, decay,
        one_minus_beta1, one_minus_beta2, eps, weight_decay, DECOUPLED,
    )  # fmt: skip
    # What lies behind the end was loaded as 0, but a master there is undefined.
    exp_avg = tl.where(mask, exp_avg, 0.0)
    exp_avg_sq = tl.where(mask, exp_avg_sq, 0.0)
    largest1 = tl.max(tl.abs(exp_avg), axis=1)
    largest2 = tl.max(exp_avg_sq, axis=1)
    code1 = encode(_fraction_of(tl.abs(exp_avg), largest1[:, None]), 0)
    code1 = tl.where(exp_avg < 0.0, code1 | 128, code1)
    code2 = encode(_fraction_of(exp_avg_sq, largest2[:, None]), 1)
    code2 = tl.where((exp_avg_sq > 0.0) & (code2 == 0), 1, code2)
    bits = random32(offsets, seed, 0)
    # store
    stored = store_mask(mask, offsets, found_inf)
    row_mask = store_mask(row_mask, rows, found_inf)
    store_master(weight_ptr, master_ptr, offsets, old, new, compensation, bits & 0xFFFF, mask, stored,
                 MASTER, INTERPRETED)  # fmt: skip
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
    numel, num_groups = grad.numel(), triton.cdiv(grad.numel(), GROUP)
    check("grad", grad, GRADIENTS, numel, grad.device)
    weights.check(grad)
    check("scalars", scalars, (torch.float32,), NUM_SCALARS, grad.device)
    for name, codes in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check(name, codes, (torch.uint8,), numel, grad.device)
    for name, scales in (("exp_avg_scale", exp_avg_scale), ("exp_avg_sq_scale", exp_avg_sq_scale)):
        check(name, scales, (torch.float32,), num_groups, grad.device)
    if numel == 0:
        return
    rows = min(_ROWS, triton.next_power_of_2(num_groups)) if INTERPRET else _ROWS
    launch_one(
        _adamw_int8_kernel, triton.cdiv(num_groups, rows), grad.device,
        grad, weights.weight, weights.second, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, scalars,
        numel, seed, 1 - beta1, 1 - beta2, eps, weight_decay,
        DECOUPLED=decoupled, MASTER=weights.constexpr, INTERPRETED=INTERPRET, ROWS=rows, GROUP=GROUP,
        num_warps=_NUM_WARPS,
    )  # fmt: skip
