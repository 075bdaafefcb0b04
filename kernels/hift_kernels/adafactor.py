"""Adafactor on slices of parameters, in three passes over the gradient and two over the weights, nothing waiting.

A step: `add_squares` of each slice; an all-reduce of the sums by the caller, who divides them by the number of columns
and rows and moves the second moments towards them; `add_weight_square` and `add_update_square`; an all-reduce of their
results; `coefficients`; `adafactor_step`. A slice starts and ends anywhere in the flattened parameter; each
pass may be given it in parts. At most 8 launches for each parameter or part.

A parameter of two or more dimensions is (batches, rows, columns) and has two moments: `row_var`, of batches * rows
elements, and `col_var`, of batches * columns. One of fewer has `variance`, as long as itself.

Bytes moved per parameter of a matrix with bf16 gradients and weights and an fp32 master: 2 + 4 + 2 + 12 = 20, besides
the moments, which fit in a cache. Kept: 4 / rows + 4 / columns.

Source: arXiv 1804.04235; maths: torch.optim.Adafactor with foreach=False, as hift_ds.rules.adafactor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from hift_kernels.adafactor_squares import Moments, add_squares, check_slice
from hift_kernels.grad_norm import add_over_tiles
from hift_kernels.launching import Weights, check, launch
from hift_kernels.rounding import load_master, random32, store_mask, store_master, widen
from hift_kernels.scalars import DECAY, FOUND_INF, SCALE

__all__ = ["adafactor_step", "add_squares", "add_update_square", "add_weight_square", "coefficients"]


@triton.jit
def _weight_square_kernel(
    partial_ptr, numel, weight_ptr, master_ptr, MASTER: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr
):
    program = tl.program_id(0)
    total = tl.zeros((TILE,), dtype=tl.float32)
    for tile in range(TILES):
        offsets = (program.to(tl.int64) * TILES + tile) * TILE + tl.arange(0, TILE)
        mask = offsets < numel
        master = load_master(weight_ptr, master_ptr, offsets, mask, MASTER)
        total += tl.where(mask, master * master, 0.0)
    tl.store(partial_ptr + program, tl.sum(total.to(tl.float64), axis=0))


@triton.jit
def _estimate(
    row_ptr, col_ptr, mean_ptr, first, mask, num_rows, num_columns, eps1_square,
    FACTORED: tl.constexpr, BATCHED: tl.constexpr, FOURS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The second moments of the elements from `first` of the parameter on; a gradient over their root is its update."""
    places = tl.arange(0, TILE)
    if FACTORED:
        # 64-bit division once a tile; an element's is of 32 bits, from the start of the tile's first row.
        line = first // num_columns
        places = (first % num_columns).to(tl.uint32) + places.to(tl.uint32)
        columns = (places % tl.cast(num_columns, tl.uint32)).to(tl.int64)
        lines = places // tl.cast(num_columns, tl.uint32)
        if BATCHED:
            batches = ((line % num_rows).to(tl.uint32) + lines) // tl.cast(num_rows, tl.uint32)
            batches = line // num_rows + batches.to(tl.int64)
            columns += batches * num_columns
            mean = tl.load(mean_ptr + batches, mask=mask, other=1.0)
        else:
            mean = tl.zeros((TILE,), dtype=tl.float32) + tl.load(mean_ptr)
        if FOURS:  # a thread's four elements: Triton 3.6 does not find this out
            columns = tl.max_contiguous(tl.multiple_of(columns, 4), 4)
        estimate = tl.load(row_ptr + line + lines.to(tl.int64), mask=mask) * tl.load(col_ptr + columns, mask=mask)
        estimate = tl.div_rn(estimate, mean)
    else:
        estimate = tl.load(row_ptr + first + places, mask=mask)
    # eps1 is squared because the root comes after.
    return tl.maximum(estimate, eps1_square)


@triton.jit
def _update_square_kernel(
    partial_ptr, numel, grad_ptr, row_ptr, col_ptr, mean_ptr, scalars_ptr, start, num_rows, num_columns, eps1_square,
    FACTORED: tl.constexpr, BATCHED: tl.constexpr, FOURS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    scale = tl.load(scalars_ptr + SCALE)
    found_inf = tl.load(scalars_ptr + FOUND_INF)
    total = tl.zeros((TILE,), dtype=tl.float32)
    for tile in range(TILES):
        base = (program.to(tl.int64) * TILES + tile) * TILE
        offsets = base + tl.arange(0, TILE)
        mask = offsets < numel
        grad = widen(tl.load(grad_ptr + offsets, mask=mask, other=0.0)) * scale
        estimate = _estimate(
            row_ptr, col_ptr, mean_ptr, base + start, mask, num_rows, num_columns, eps1_square,
            FACTORED, BATCHED, FOURS, TILE,
        )  # fmt: skip
        # No root, no IEEE division: 2 bytes an element leave little time for arithmetic, and the sum is what rounds.
        total += tl.where(store_mask(mask, offsets, found_inf), grad * grad / estimate, 0.0)
    tl.store(partial_ptr + program, tl.sum(total.to(tl.float64), axis=0))


@triton.jit(do_not_specialize=["seed", "index"])
def _adafactor_kernel(
    grad_ptr, weight_ptr, master_ptr, row_ptr, col_ptr, mean_ptr, coefficient_ptr, scalars_ptr,
    numel, start, num_rows, num_columns, index, seed, eps1_square,
    FACTORED: tl.constexpr, BATCHED: tl.constexpr, FOURS: tl.constexpr,
    MASTER: tl.constexpr, INTERPRETED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(0).to(tl.int64) * TILE
    offsets = base + tl.arange(0, TILE)
    mask = offsets < numel
    # load
    grad = tl.load(grad_ptr + offsets, mask=mask)
    old = load_master(weight_ptr, master_ptr, offsets, mask, MASTER)
    coefficient = tl.load(coefficient_ptr + index)
    scale = tl.load(scalars_ptr + SCALE)
    found_inf = tl.load(scalars_ptr + FOUND_INF)
    decay = tl.load(scalars_ptr + DECAY)
    # compute
    estimate = _estimate(
        row_ptr, col_ptr, mean_ptr, base + start, mask, num_rows, num_columns, eps1_square,
        FACTORED, BATCHED, FOURS, TILE,
    )  # fmt: skip
    new = old * decay - coefficient * tl.div_rn(widen(grad) * scale, tl.sqrt_rn(estimate))
    bits = random32(start + offsets, seed, 0)  # however the parameter is cut
    # store
    stored = store_mask(mask, offsets, found_inf)
    store_master(weight_ptr, master_ptr, offsets, old, new, bits & 0xFFFF, mask, stored, MASTER, INTERPRETED)


def add_weight_square(weights: Weights, result: torch.Tensor, index: int) -> None:
    """Adds the sum of squares of some master weights to `result[index]`.

    Deterministic, as `grad_norm.sum_of_squares`. Moves per parameter what is read of the master weight: 4 bytes
    ("plain", "fp32", "split16") or 2. Keeps nothing.

    Args:
        result: fp64, 1-D, one element per parameter.

    Raises:
        ValueError: A tensor of another dtype, length, device or stride, or an index beyond `result`.
    """
    weights.check(weights.weight)
    numel, device = weights.weight.numel(), weights.weight.device
    _check_vector("result", result, torch.float64, index, device)
    if numel:
        add_over_tiles(_weight_square_kernel, numel, result[index : index + 1], weights.weight, weights.second,
                       MASTER=weights.constexpr)  # fmt: skip


def add_update_square(
    grad: torch.Tensor,
    shape: Sequence[int],
    start: int,
    scalars: torch.Tensor,
    moments: Moments,
    row_mean: torch.Tensor | None,
    result: torch.Tensor,
    index: int,
    *,
    eps1: float,
) -> None:
    """Adds the sum of squares of a slice's update, before clipping, to `result[index]`; 0 for gradients not finite.

    Deterministic, as `grad_norm.sum_of_squares`. Moves per parameter the gradient (2 bytes in bf16), and 4 of variance
    for a parameter of fewer than two dimensions. Keeps nothing.

    Args:
        grad, shape, start, scalars: As in `add_squares`; any part of a slice.
        moments: `row_var` and `col_var`, or `variance`: fp32, 1-D, whole, this step's.
        row_mean: fp32, the mean of `row_var` in each batch, at least `eps1`. `None` for fewer than two dimensions.
        result: fp64, 1-D, one element per parameter.

    Raises:
        ValueError: A tensor of another dtype, length, device or stride, a slice that is not in the parameter, or an
            index beyond `result`.
    """
    geometry = check_slice(grad, shape, start, scalars, moments)
    pointers = _pointers(shape, moments, row_mean, geometry[0])
    _check_vector("result", result, torch.float64, index, grad.device)
    if grad.numel():
        add_over_tiles(
            _update_square_kernel, grad.numel(), result[index : index + 1],
            grad, *pointers, scalars, start, *geometry[1:], eps1 * eps1,
            **_constexprs(shape, start),
        )  # fmt: skip


def adafactor_step(
    grad: torch.Tensor,
    weights: Weights,
    shape: Sequence[int],
    start: int,
    scalars: torch.Tensor,
    moments: Moments,
    row_mean: torch.Tensor | None,
    coefficient: torch.Tensor,
    index: int,
    *,
    eps1: float,
    seed: int = 0,
) -> None:
    """Unscale, precondition, clip, weight decay, master weights and model weights of a tile in one pass, in place.

    Moves per parameter: the gradient, what `Weights` says, and 4 bytes of variance for a parameter of fewer than two
    dimensions: 12 bytes of a matrix with an fp32 master and bf16 gradients and weights. Keeps nothing. Nothing is
    stored where `scalars` says that a gradient is not finite.

    Args:
        grad, shape, start, scalars: As in `add_squares`; any part of a slice.
        weights: As long as `grad`.
        moments, row_mean: As in `add_update_square`.
        coefficient: fp32, 1-D, one element per parameter, from `coefficients`.
        seed: Draws the stochastic rounding of a master of form "none".

    Raises:
        ValueError: A tensor of another dtype, length, device or stride, a slice that is not in the parameter, or an
            index beyond `coefficient`.
    """
    geometry = check_slice(grad, shape, start, scalars, moments)
    pointers = _pointers(shape, moments, row_mean, geometry[0])
    weights.check(grad)
    _check_vector("coefficient", coefficient, torch.float32, index, grad.device)
    launch(
        _adafactor_kernel, grad.numel(), grad.device,
        grad, weights.weight, weights.second, *pointers, coefficient, scalars,
        grad.numel(), start, *geometry[1:], index, seed, eps1 * eps1,
        **_constexprs(shape, start), MASTER=weights.constexpr,
    )  # fmt: skip


def coefficients(
    param_squares: torch.Tensor,
    update_squares: torch.Tensor,
    numels: torch.Tensor,
    lr: float,
    step: int,
    *,
    eps2: float,
    threshold: float,
) -> torch.Tensor:
    """What each parameter's update is multiplied by: the relative step size over the clipping's divisor, in fp32.

    Args:
        param_squares: fp64, 1-D: from `add_weight_square`, summed over the ranks.
        update_squares: fp64, 1-D: from `add_update_square`, summed over the ranks.
        numels: Elements of each parameter, on the same device.
        lr: Largest relative step size.
        step: Counts updates, this one included.
        eps2: Least root mean square that a parameter is taken to have.
        threshold: Root mean square of an update above which it is clipped ("d").
    """
    numels = numels.double().clamp(min=1)  # a parameter of no elements is not updated
    alpha = (param_squares / numels).sqrt().clamp(min=eps2) * min(lr, 1 / step**0.5)
    clip = ((update_squares / numels).sqrt() / threshold).clamp(min=1.0)
    return (alpha / clip).float()


def _pointers(
    shape: Sequence[int], moments: Moments, row_mean: torch.Tensor | None, batches: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row moments, column moments and row means for the kernels; for a vector they do not touch the last two."""
    if (row_mean is None) != (len(shape) < 2):
        raise ValueError(f"row_mean: must be {'None' if len(shape) < 2 else 'a tensor'} for shape {tuple(shape)}")
    if row_mean is None:
        return moments[0], moments[0], moments[0]
    check("row_mean", row_mean, (torch.float32,), batches, moments[0].device)
    return moments[0], moments[1], row_mean


def _constexprs(shape: Sequence[int], start: int) -> dict[str, bool]:
    fours = len(shape) > 1 and shape[-1] % 4 == 0 and start % 4 == 0  # four elements lie side by side in one row
    return {"FACTORED": len(shape) > 1, "BATCHED": math.prod(shape[:-2]) > 1, "FOURS": fours}


def _check_vector(name: str, vector: torch.Tensor, dtype: torch.dtype, index: int, device: torch.device) -> None:
    """Refuses a vector that has no element for the parameter."""
    check(name, vector, (dtype,), vector.numel(), device)
    if not 0 <= index < vector.numel():
        raise ValueError(f"index={index!r}: must be from 0 to {vector.numel() - 1}, the last of {name}")
