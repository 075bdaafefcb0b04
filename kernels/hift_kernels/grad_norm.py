"""Gradient norm, clip coefficient, found_inf, step and bias corrections: computed and left on the device.

A step without a wait of the host: `sum_of_squares` of each gradient shard, an all-reduce of its result by the caller,
then `prepare` for each param group, and the update kernels read its vector of scalars.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hift_kernels import scalars as places
from hift_kernels.launching import GRADIENTS, NUM_SCALARS, check, fp64_halves, launch_one
from hift_kernels.rounding import INTERPRET, widen
from hift_kernels.scalars import load_step, store_scalars

# Places in the vector of scalars, as the host counts them.
SCALE, FOUND_INF = places.SCALE.value, places.FOUND_INF.value
STEP_SIZE, INV_SQRT_BC2 = places.STEP_SIZE.value, places.INV_SQRT_BC2.value
DECAY, RATE, NORM, STEP = places.DECAY.value, places.RATE.value, places.NORM.value, places.STEP.value
MAX_PROGRAMS = 1024
_TILE = 65536 if INTERPRET else 2048
_NUM_WARPS = 8


@triton.jit
def _sum_of_squares_kernel(partial_ptr, numel, grad_ptr, TILES: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0)
    start = program.to(tl.int64) * TILES * TILE
    total = tl.zeros((TILE,), dtype=tl.float32)
    for tile in range(TILES):
        offsets = start + tile * TILE + tl.arange(0, TILE)
        grad = widen(tl.load(grad_ptr + offsets, mask=offsets < numel, other=0.0))
        total += grad * grad
    tl.store(partial_ptr + program, tl.sum(total.to(tl.float64), axis=0))


@triton.jit
def _finish_kernel(partial_ptr, num_partials, result_ptr, ACCUMULATE: tl.constexpr, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    total = tl.sum(tl.load(partial_ptr + offsets, mask=offsets < num_partials, other=0.0), axis=0)
    if ACCUMULATE:
        total += tl.load(result_ptr)
    tl.store(result_ptr, total)


def add_over_tiles(
    kernel: Any, numel: int, result: torch.Tensor, *args: Any, accumulate: bool = True, **constexprs: Any
) -> None:
    """Runs a kernel that leaves one fp64 partial sum per program, and adds these up in `result`.

    Deterministic: a fixed grid of at most MAX_PROGRAMS programs (8 KiB of partial sums), no atomics.

    Args:
        kernel: Takes `partial_ptr` and `numel` first, and the constexprs TILES and TILE: a program's tiles.
        numel: Elements to add over, at least one.
        result: fp64, one element.
    """
    tile = min(_TILE, triton.next_power_of_2(numel)) if INTERPRET else _TILE
    num_tiles = triton.cdiv(numel, tile)
    # A constexpr (Triton 3.6 interprets no loop of a length that is an argument), so a power of two: few variants.
    tiles = triton.next_power_of_2(triton.cdiv(num_tiles, MAX_PROGRAMS))
    num_programs = triton.cdiv(num_tiles, tiles)
    partials = torch.empty(num_programs, dtype=torch.float64, device=result.device)
    launch_one(kernel, num_programs, result.device, partials, numel, *args,
               TILES=tiles, TILE=tile, num_warps=_NUM_WARPS, **constexprs)  # fmt: skip
    if num_programs == 1 and accumulate:  # one small parameter of many
        result.add_(partials)
        return
    launch_one(_finish_kernel, 1, result.device, partials, num_programs, result,
               ACCUMULATE=accumulate, TILE=MAX_PROGRAMS, num_warps=_NUM_WARPS)  # fmt: skip


def sum_of_squares(grad: torch.Tensor, result: torch.Tensor, accumulate: bool = False) -> None:
    """Leaves the sum of squares of `grad` in `result`, which is inf or nan where a gradient is.

    (Or where a finite one is beyond 1e19, so that its square is not; that counts as an overflow, too.)

    Deterministic: a fixed grid, fp32 in a thread (at most 2048 squares of a tile column), fp64 between threads and
    programs, no atomics. Moves 2 bytes per parameter of a bf16 gradient (4 of fp32) and keeps nothing.

    Args:
        grad: bf16, fp16 or fp32, 1-D, contiguous.
        result: fp64, one element, same device.
        accumulate: Add to what is there.

    Raises:
        ValueError: A tensor of another dtype, shape, device or stride.
    """
    check("grad", grad, GRADIENTS, grad.numel(), grad.device)
    check("result", result, (torch.float64,), 1, grad.device)
    if grad.numel():
        add_over_tiles(_sum_of_squares_kernel, grad.numel(), result, grad, accumulate=accumulate)
    elif not accumulate:
        result.zero_()


@triton.jit
def _power(base, exponent):
    """base ** exponent in fp64, 0 <= exponent < 2^24 (as far as fp32 counts), by squaring: the same bits everywhere."""
    result = base * 0.0 + 1.0
    square = base
    rest = exponent
    for _ in range(24):
        result = tl.where((rest & 1) == 1, result * square, result)
        square = square * square
        rest = rest >> 1
    return result


@triton.jit
def _prepare_kernel(
    square_ptr, divisor_ptr, scalars_ptr,
    rate_high, rate_low, beta1_high, beta1_low, beta2_high, beta2_low, decay_high, decay_low,
    max_norm_high, max_norm_low,
    CLIP: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    # load
    square = tl.load(square_ptr)
    divisor = tl.load(divisor_ptr)  # of the gradient: loss scale
    step = load_step(scalars_ptr)
    # compute, all of it in fp64; a Python float arrives as fp32 (interpreted: as a float), so it comes in two halves
    zero = divisor * 0.0
    rate = zero + rate_high + rate_low
    beta1 = zero + beta1_high + beta1_low
    beta2 = zero + beta2_high + beta2_low
    weight_decay = zero + decay_high + decay_low
    norm = tl.sqrt(square) / divisor
    found_inf = (square != square) | (square == float("inf"))
    if CLIP:
        max_norm = zero + max_norm_high + max_norm_low
        excess = (norm + 1e-6) / max_norm
        divisor = divisor * tl.where(excess > 1.0, excess, 1.0)
    step = tl.where(found_inf, step, step + 1.0)
    correction1 = zero + 1.0
    correction2 = correction1
    if CORRECT:
        correction1 = 1.0 - _power(beta1, step.to(tl.int32))
        correction2 = 1.0 - _power(beta2, step.to(tl.int32))
    # store
    store_scalars(
        scalars_ptr, 1.0 / divisor, tl.where(found_inf, 1.0, 0.0), rate / correction1, 1.0 / tl.sqrt(correction2),
        1.0 - rate * weight_decay, rate, norm, step,
    )  # fmt: skip


def prepare(
    square: torch.Tensor,
    divisor: torch.Tensor,
    scalars: torch.Tensor,
    *,
    lr: float,
    beta1: float = 0.0,
    beta2: float = 0.0,
    weight_decay: float = 0.0,
    max_norm: float = 0.0,
    bias_correction: bool = False,
) -> None:
    """Turns the sum of squares into everything that the update kernels of one param group need, on the device.

    One program, fp64 inside. `scalars` holds afterwards: SCALE, what a gradient is multiplied by (1 / loss scale, and
    clipped); FOUND_INF, 1 if a gradient is not finite (then the updates store nothing, and STEP stays); STEP_SIZE, lr
    over Adam's first bias correction; INV_SQRT_BC2, one over the root of the second; DECAY, 1 - lr * weight_decay;
    RATE, lr; NORM, the unscaled gradient norm; STEP, updates so far, this one included.

    Source: torch.nn.utils.clip_grad_norm_ (norm + 1e-6); Adam, arXiv 1412.6980, algorithm 1.

    Args:
        square: fp64, one element: sum of squares over all ranks, of scaled gradients.
        divisor: fp64, one element: what unscales a gradient, the loss scale.
        scalars: fp32, NUM_SCALARS elements, one vector per block and param group, zeros at first; only STEP is read.
        max_norm: Largest norm, 0 for no clipping.

    Raises:
        ValueError: A tensor of another dtype, shape, device or stride.
    """
    check("square", square, (torch.float64,), 1, scalars.device)
    check("divisor", divisor, (torch.float64,), 1, scalars.device)
    check("scalars", scalars, (torch.float32,), NUM_SCALARS, scalars.device)
    halves = [half for value in (lr, beta1, beta2, weight_decay, max_norm) for half in fp64_halves(value)]
    launch_one(_prepare_kernel, 1, scalars.device, square, divisor, scalars, *halves,
               CLIP=max_norm > 0, CORRECT=bias_correction, num_warps=1)  # fmt: skip
