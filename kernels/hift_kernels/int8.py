"""AdamW, Lion and SGD with 8-bit moments (`hift_kernels.quantize`), in one pass over a flat shard: one kernel.

The code of AdamW's second moment is at least 1 where the moment is not 0, which the source does not have. Without that
an element much smaller than its neighbours is divided by eps alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hift_kernels.adamw import adam_math
from hift_kernels.launching import Weights, check_update
from hift_kernels.lion import lion_math
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
from hift_kernels.scalars import DECAY, FOUND_INF, INV_SQRT_BC2, RATE, SCALE, STEP, STEP_SIZE
from hift_kernels.sgd import momentum_math

# Constexpr RULE of the kernel
ADAMW, LION, SGD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["seed"])
def _int8_kernel(
    grad_ptr, weight_ptr, master_ptr, code1_ptr, code2_ptr, scale1_ptr, scale2_ptr, scalars_ptr, numel, seed,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay,
    RULE: tl.constexpr, OPTION: tl.constexpr, MASTER: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """OPTION: AdamW's decoupled weight decay, SGD's Nesterov. SGD's momentum and dampening are beta1's two."""
    rows, offsets, row_mask, mask = groups_of(numel, ROWS, GROUP)
    # load
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    old = load_master(weight_ptr, master_ptr, offsets, mask, MASTER)
    code1, largest1 = load_codes(code1_ptr, scale1_ptr, offsets, rows, mask, row_mask)
    if RULE == ADAMW:
        code2, largest2 = load_codes(code2_ptr, scale2_ptr, offsets, rows, mask, row_mask)
    scale = tl.load(scalars_ptr + SCALE)
    found_inf = tl.load(scalars_ptr + FOUND_INF)
    step_size = tl.load(scalars_ptr + STEP_SIZE)
    inv_sqrt_bc2 = tl.load(scalars_ptr + INV_SQRT_BC2)
    decay = tl.load(scalars_ptr + DECAY)
    rate = tl.load(scalars_ptr + RATE)
    step = tl.load(scalars_ptr + STEP)
    # compute
    first = decode_signed(code1, largest1)
    if RULE == ADAMW:
        second = decode(code2, 1) * largest2
        new, first, second = adam_math(
            old, widen(grad) * scale, first, second, step_size, inv_sqrt_bc2, decay,
            one_minus_beta1, one_minus_beta2, eps, weight_decay, OPTION,
        )  # fmt: skip
    elif RULE == LION:
        new, first = lion_math(
            old, widen(grad) * scale, first, decay, rate, beta1, one_minus_beta1, beta2, one_minus_beta2
        )
    else:
        direction = widen(grad) * scale + weight_decay * old
        direction, first = momentum_math(direction, first, step, beta1, one_minus_beta1, OPTION)
        new = old - rate * direction
    # What lies behind the end was loaded as 0, but a master there, which Lion's momentum does not see, is undefined.
    if RULE != LION:
        first = tl.where(mask, first, 0.0)
    largest1 = tl.max(tl.abs(first), axis=1)
    # Both before either is encoded: with Triton 3.6 the other order costs 27 registers.
    if RULE == ADAMW:
        second = tl.where(mask, second, 0.0)
        largest2 = tl.max(second, axis=1)
    code1 = encode_signed(first, largest1)
    if RULE == ADAMW:
        code2 = encode(fraction_of(second, largest2[:, None]), 1)
        code2 = tl.where((second > 0.0) & (code2 == 0), 1, code2)
    bits = random32(offsets, seed, 0)
    # store
    stored = store_mask(mask, offsets, found_inf)
    row_mask = store_mask(row_mask, rows, found_inf)
    store_master(weight_ptr, master_ptr, offsets, old, new, bits & 0xFFFF, mask, stored, MASTER, INTERPRETED)
    tl.store(code1_ptr + offsets, code1.to(tl.uint8), mask=stored)
    if RULE == ADAMW:
        tl.store(code2_ptr + offsets, code2.to(tl.uint8), mask=stored)
    tl.store(scale1_ptr + rows, largest1, mask=row_mask)
    if RULE == ADAMW:
        tl.store(scale2_ptr + rows, largest2, mask=row_mask)


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
    moments = {"exp_avg": (exp_avg, exp_avg_scale), "exp_avg_sq": (exp_avg_sq, exp_avg_sq_scale)}
    hyper = (None, 1 - beta1, None, 1 - beta2, eps, weight_decay)
    _step(grad, weights, moments, scalars, seed, hyper, RULE=ADAMW.value, OPTION=decoupled)


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
        grad, exp_avg, exp_avg_scale, seed: As in `adamw_int8_step`.
        scalars: From `grad_norm.prepare`.

    Raises:
        ValueError: A tensor of another dtype, length, device or stride.
    """
    hyper = (beta1, 1 - beta1, beta2, 1 - beta2, None, None)
    moments = {"exp_avg": (exp_avg, exp_avg_scale)}
    _step(grad, weights, moments, scalars, seed, hyper, RULE=LION.value, OPTION=False)


def sgd_int8_step(
    grad: torch.Tensor,
    weights: Weights,
    momentum_buffer: torch.Tensor,
    momentum_buffer_scale: torch.Tensor,
    scalars: torch.Tensor,
    *,
    momentum: float,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    seed: int = 0,
) -> None:
    """`sgd.sgd_step` with the momentum as 8-bit codes, in place.

    Moves and keeps the bytes of `lion_int8_step`.

    Args:
        grad, seed: As in `adamw_int8_step`.
        momentum_buffer, momentum_buffer_scale: As `exp_avg` and `exp_avg_scale` there.
        scalars: From `grad_norm.prepare`.

    Raises:
        ValueError: A tensor of another dtype, length, device or stride.
    """
    hyper = (momentum, 1 - dampening, None, None, None, weight_decay)
    moments = {"momentum_buffer": (momentum_buffer, momentum_buffer_scale)}
    _step(grad, weights, moments, scalars, seed, hyper, RULE=SGD.value, OPTION=nesterov)


def _step(
    grad: torch.Tensor,
    weights: Weights,
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]],
    scalars: torch.Tensor,
    seed: int,
    hyper: tuple[float | None, ...],
    **constexprs: int,
) -> None:
    """Checks and launches.

    Args:
        moments: name -> codes and scales.
        hyper: `None` for what a rule does not have, which then is no parameter of its compiled kernel.
    """
    check_update(grad, weights, scalars)
    for name, pair in moments.items():
        check_codes(*pair, name, grad.numel(), grad.device)
    codes, scales = zip(*moments.values(), *[(None, None)] * (2 - len(moments)), strict=True)
    launch_groups(
        _int8_kernel, grad.numel(), grad.device,
        grad, weights.weight, weights.second, *codes, *scales, scalars, grad.numel(), seed, *hyper,
        MASTER=weights.constexpr, **constexprs,
    )  # fmt: skip
