"""SGD, plain and with momentum, in one pass over a flat shard."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hift_kernels.launching import Weights, check_update, launch
from hift_kernels.rounding import load_master, random32, store_mask, store_master, store_rounded, widen
from hift_kernels.scalars import FOUND_INF, RATE, SCALE, STEP


@triton.jit
def momentum_math(direction, buffer, step, momentum, one_minus_dampening, NESTEROV: tl.constexpr):
    """Direction and new momentum buffer of a gradient with its weight decay, all fp32."""
    first = (tl.zeros_like(direction) + step) == 1.0  # the first buffer is the gradient, undamped
    updated = tl.where(first, direction, buffer * momentum + one_minus_dampening * direction)
    if NESTEROV:
        direction = direction + momentum * updated
    else:
        direction = updated
    return direction, updated


@triton.jit(do_not_specialize=["seed"])
def _sgd_kernel(
    grad_ptr, weight_ptr, master_ptr, momentum_ptr, scalars_ptr, numel, seed,
    momentum, one_minus_dampening, weight_decay,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MASTER: tl.constexpr, INTERPRETED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offsets < numel
    # load
    grad = tl.load(grad_ptr + offsets, mask=mask)
    old = load_master(weight_ptr, master_ptr, offsets, mask, MASTER)
    if MOMENTUM:
        buffer = tl.load(momentum_ptr + offsets, mask=mask)
    scale = tl.load(scalars_ptr + SCALE)
    found_inf = tl.load(scalars_ptr + FOUND_INF)
    rate = tl.load(scalars_ptr + RATE)
    step = tl.load(scalars_ptr + STEP)
    # compute
    direction = widen(grad) * scale + weight_decay * old
    if MOMENTUM:
        direction, updated = momentum_math(direction, widen(buffer), step, momentum, one_minus_dampening, NESTEROV)
    new = old - rate * direction
    bits = random32(offsets, seed, 0)
    # store
    stored = store_mask(mask, offsets, found_inf)
    store_master(weight_ptr, master_ptr, offsets, old, new, bits & 0xFFFF, mask, stored, MASTER, INTERPRETED)
    if MOMENTUM:
        store_rounded(momentum_ptr + offsets, updated, stored, bits >> 16, True, INTERPRETED)


def sgd_step(
    grad: torch.Tensor,
    weights: Weights,
    momentum_buffer: torch.Tensor | None,
    scalars: torch.Tensor,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    seed: int = 0,
) -> None:
    """Unscale, clip, weight decay, momentum, master weights and model weights in one pass, in place.

    Moves per parameter: the gradient, what `Weights` says and, with momentum, 4 + 4 bytes of an fp32 buffer: 20 bytes
    with an fp32 master and bf16 gradients and weights (12 without momentum). Keeps 4 (0).

    Source: torch.optim.SGD; the first buffer is the gradient, undamped.

    Args:
        grad: bf16, fp16 or fp32, 1-D, as reduced (scaled, not clipped). All others are as long.
        momentum_buffer: fp32 or bf16; `None` if and only if `momentum` is 0.
        scalars: From `grad_norm.prepare`.
        seed: Draws the stochastic rounding.

    Raises:
        ValueError: A tensor of another dtype, length, device or stride, or a buffer too many or missing.
    """
    if (momentum_buffer is None) != (momentum == 0):
        raise ValueError(f"momentum={momentum!r}: momentum_buffer must be None for 0 and a tensor otherwise")
    moments = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    check_update(grad, weights, scalars, **moments)
    launch(
        _sgd_kernel, grad.numel(), grad.device,
        grad, weights.weight, weights.second, grad if momentum_buffer is None else momentum_buffer, scalars,
        grad.numel(), seed, momentum, 1 - dampening, weight_decay,
        MOMENTUM=momentum_buffer is not None, NESTEROV=nesterov, MASTER=weights.constexpr,
    )  # fmt: skip
