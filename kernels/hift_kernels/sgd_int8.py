"""SGD with its momentum as 8-bit codes (`hift_kernels.quantize`), in one pass over a flat shard."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hift_kernels.launching import Weights, check_update
from hift_kernels.quantize import check_codes, decode_signed, encode_signed, groups_of, launch_groups, load_codes
from hift_kernels.rounding import load_master, random32, store_mask, store_master, widen
from hift_kernels.scalars import FOUND_INF, RATE, SCALE, STEP
from hift_kernels.sgd import momentum_math


@triton.jit(do_not_specialize=["seed"])
def _sgd_int8_kernel(
    grad_ptr, weight_ptr, master_ptr, momentum_ptr, momentum_scale_ptr, scalars_ptr, numel, seed,
    momentum, one_minus_dampening, weight_decay,
    NESTEROV: tl.constexpr, MASTER: tl.constexpr, INTERPRETED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    rows, offsets, row_mask, mask = groups_of(numel, ROWS, GROUP)
    # load
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    old = load_master(weight_ptr, master_ptr, offsets, mask, MASTER)
    code, largest = load_codes(momentum_ptr, momentum_scale_ptr, offsets, rows, mask, row_mask)
    scale = tl.load(scalars_ptr + SCALE)
    found_inf = tl.load(scalars_ptr + FOUND_INF)
    rate = tl.load(scalars_ptr + RATE)
    step = tl.load(scalars_ptr + STEP)
    # compute
    buffer = decode_signed(code, largest)
    direction = widen(grad) * scale + weight_decay * old
    direction, updated = momentum_math(direction, buffer, step, momentum, one_minus_dampening, NESTEROV)
    new = old - rate * direction
    updated = tl.where(mask, updated, 0.0)  # behind the end the master, and with it the direction, is undefined
    largest = tl.max(tl.abs(updated), axis=1)
    code = encode_signed(updated, largest)
    bits = random32(offsets, seed, 0)
    # store
    stored = store_mask(mask, offsets, found_inf)
    store_master(weight_ptr, master_ptr, offsets, old, new, bits & 0xFFFF, mask, stored, MASTER, INTERPRETED)
    tl.store(momentum_ptr + offsets, code.to(tl.uint8), mask=stored)
    tl.store(momentum_scale_ptr + rows, largest, mask=store_mask(row_mask, rows, found_inf))


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

    Moves per parameter: the gradient, what `Weights` says, 1 + 1 bytes of codes and 8 / 256 of scales: 14.03 bytes with
    an fp32 master and bf16 gradients and weights. Keeps 1.02 bytes of momentum.

    Args:
        grad: bf16, fp16 or fp32, 1-D, as reduced (scaled, not clipped).
        momentum_buffer: uint8 codes, as long; sign in the highest bit. Zeros at first.
        momentum_buffer_scale: fp32, one per GROUP elements, the last group may be shorter. Zeros at first.
        scalars: From `grad_norm.prepare`.
        seed: Draws the stochastic rounding of a master of form "none".

    Raises:
        ValueError: A tensor of another dtype, length, device or stride.
    """
    check_update(grad, weights, scalars)
    check_codes(momentum_buffer, momentum_buffer_scale, "momentum_buffer", grad.numel(), grad.device)
    launch_groups(
        _sgd_int8_kernel, grad.numel(), grad.device,
        grad, weights.weight, weights.second, momentum_buffer, momentum_buffer_scale, scalars, grad.numel(), seed,
        momentum, 1 - dampening, weight_decay, NESTEROV=nesterov, MASTER=weights.constexpr,
    )  # fmt: skip
