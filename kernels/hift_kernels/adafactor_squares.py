"""The second moments of Adafactor: sums of squares over rows and columns, in one pass over a slice's gradient.

A slice starts and ends anywhere in the flattened parameter, which is (batches, rows, columns) if it has two or more
dimensions. A program sums a block of rows and columns, or of many batches of a few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from hift_kernels.launching import GRADIENTS, NUM_SCALARS, check, launch, launch_one
from hift_kernels.rounding import INTERPRET, store_mask, widen
from hift_kernels.scalars import FOUND_INF, SCALE

Moments = tuple[torch.Tensor, ...]
_NUM_WARPS = 4
_BLOCK = 65536 if INTERPRET else 2048  # elements that a program of add_squares holds at once: 16 a thread
_COLUMNS = 4096 if INTERPRET else 256  # of them side by side, at most
_BLOCKS = 1 if INTERPRET else 32  # of them below each other, at most: 256 rows
_PROGRAMS = 1024  # and fewer where that would leave less than this
_PARTIALS = 16  # that a program adds at once


@triton.jit
def _squares_kernel(
    grad_ptr, row_partial_ptr, col_partial_ptr, scalars_ptr,
    numel, skip, num_batches, num_rows, num_columns, row_blocks, col_blocks,
    BLOCKS: tl.constexpr, BATCHES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    col_block = program % col_blocks
    row_block = program // col_blocks % row_blocks
    batches = program // col_blocks // row_blocks * BATCHES + tl.arange(0, BATCHES)
    columns = col_block * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(scalars_ptr + SCALE)
    total = tl.zeros((BATCHES, ROWS, COLUMNS), dtype=tl.float32)
    for block in range(BLOCKS):
        rows = (row_block * BLOCKS + block) * ROWS + tl.arange(0, ROWS)
        lines = batches[:, None] * num_rows + rows[None, :]
        mask = (batches < num_batches)[:, None] & (rows < num_rows)[None, :]
        offsets = lines[:, :, None] * num_columns + columns[None, None, :] - skip
        inside = (offsets >= 0) & (offsets < numel) & (columns < num_columns)[None, None, :] & mask[:, :, None]
        grad = widen(tl.load(grad_ptr + offsets, mask=inside, other=0.0)) * scale
        total += grad * grad
        partial = tl.sum(grad * grad, axis=2).to(tl.float64)
        tl.store(row_partial_ptr + col_block * num_batches * num_rows + lines, partial, mask=mask)
    places = batches[:, None] * num_columns + columns[None, :]
    mask = (batches < num_batches)[:, None] & (columns < num_columns)[None, :]
    partial = tl.sum(total.to(tl.float64), axis=1)
    tl.store(col_partial_ptr + row_block * num_batches * num_columns + places, partial, mask=mask)


@triton.jit
def _add_partials_kernel(
    partial_ptr, sum_ptr, scalars_ptr, num_partials, length,
    CHUNKS: tl.constexpr, PARTIALS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), dtype=tl.float64)
    for chunk in range(CHUNKS):
        parts = (chunk * PARTIALS + tl.arange(0, PARTIALS)).to(tl.int64)
        mask = (parts < num_partials)[:, None] & (offsets < length)[None, :]
        partial = tl.load(partial_ptr + parts[:, None] * length + offsets[None, :], mask=mask, other=0.0)
        total += tl.sum(partial, axis=0)
    mask = store_mask(offsets < length, offsets, tl.load(scalars_ptr + FOUND_INF))
    sums = tl.load(sum_ptr + offsets, mask=mask, other=0.0)
    tl.store(sum_ptr + offsets, (sums.to(tl.float64) + total).to(tl.float32), mask=mask)


@triton.jit
def _variance_kernel(grad_ptr, variance_ptr, scalars_ptr, numel, INTERPRETED: tl.constexpr, TILE: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offsets < numel
    grad = widen(tl.load(grad_ptr + offsets, mask=mask)) * tl.load(scalars_ptr + SCALE)
    variance = tl.load(variance_ptr + offsets, mask=mask) + grad * grad
    tl.store(variance_ptr + offsets, variance, mask=store_mask(mask, offsets, tl.load(scalars_ptr + FOUND_INF)))


def add_squares(grad: torch.Tensor, shape: Sequence[int], start: int, scalars: torch.Tensor, moments: Moments) -> None:
    """Adds the squares of a slice of an unscaled gradient: over columns and over rows, or element by element.

    Nothing is added where `scalars` says that a gradient is not finite; the caller then must not move its moments
    towards these sums.

    Deterministic: fp32 in blocks of at most 256 columns and rows, fp64 between them, no atomics. Moves per parameter
    the gradient (2 bytes in bf16) and partial sums, written and read, of 16 bytes for each row and each column of a
    block: 0.13 in all where blocks are of 256 by 256; 2.1 where they are of 8 rows, in slices so small that larger ones
    would leave a GPU idle; 16 / rows + 16 / columns in smaller matrices. Fewer than two dimensions: the gradient and
    4 + 4. Keeps nothing.

    Args:
        grad: bf16, fp16 or fp32, 1-D, as reduced (scaled, not clipped): elements from `start` of the parameter on.
        shape: Of the whole parameter.
        scalars: From `grad_norm.prepare`.
        moments: fp32, 1-D, whole: sums of rows and of columns, or of single elements.

    Raises:
        ValueError: A tensor of another dtype, length, device or stride, or a slice that is not in the parameter.
    """
    batches, rows, columns = check_slice(grad, shape, start, scalars, moments)
    stop = start + grad.numel()
    if start == stop:
        return
    if len(shape) < 2:
        variance = moments[0][start:stop]
        launch(_variance_kernel, grad.numel(), grad.device, grad, variance, scalars, grad.numel())
        return
    # The rows that the slice touches: some of one batch, or all of several.
    first, last = start // columns, (stop - 1) // columns
    batch, last_batch = first // rows, last // rows
    if batch == last_batch:
        batches, num_rows = 1, last - first + 1
    else:
        batches, num_rows, first = last_batch - batch + 1, rows, batch * rows
    row_sums = moments[0][first : first + batches * num_rows]
    col_sums = moments[1][batch * columns : (batch + batches) * columns]
    _add_matrices(grad, start - first * columns, (batches, num_rows, columns), scalars, row_sums, col_sums)


def _add_matrices(
    grad: torch.Tensor,
    skip: int,
    shape: tuple[int, int, int],
    scalars: torch.Tensor,
    row_sums: torch.Tensor,
    col_sums: torch.Tensor,
) -> None:
    """`add_squares` of matrices whose first `skip` elements are missing, as some of the last may be."""
    batches, rows, columns = shape
    block_columns = min(triton.next_power_of_2(columns), _COLUMNS)
    block_rows = min(triton.next_power_of_2(rows), _BLOCK // block_columns)
    block_batches = min(triton.next_power_of_2(batches), _BLOCK // (block_columns * block_rows))
    col_blocks = triton.cdiv(columns, block_columns)
    num_blocks = col_blocks * triton.cdiv(rows, block_rows) * triton.cdiv(batches, block_batches)
    # A constexpr and a power of two, as in grad_norm.
    blocks = min(_BLOCKS, triton.next_power_of_2(max(1, num_blocks // _PROGRAMS)))
    blocks = min(blocks, triton.next_power_of_2(triton.cdiv(rows, block_rows)))
    row_blocks = triton.cdiv(rows, block_rows * blocks)
    num_programs = col_blocks * row_blocks * triton.cdiv(batches, block_batches)
    row_partials, col_partials = (
        torch.empty(length, dtype=torch.float64, device=grad.device)
        for length in (col_blocks * row_sums.numel(), row_blocks * col_sums.numel())
    )
    launch_one(
        _squares_kernel, num_programs, grad.device,
        grad, row_partials, col_partials, scalars, grad.numel(), skip, batches, rows, columns, row_blocks, col_blocks,
        BLOCKS=blocks, BATCHES=block_batches, ROWS=block_rows, COLUMNS=block_columns, num_warps=_NUM_WARPS,
    )  # fmt: skip
    _add_partials(row_partials, col_blocks, scalars, row_sums)
    _add_partials(col_partials, row_blocks, scalars, col_sums)


def _add_partials(partials: torch.Tensor, num_partials: int, scalars: torch.Tensor, sums: torch.Tensor) -> None:
    length = sums.numel()
    tile = min(_COLUMNS, triton.next_power_of_2(length)) if INTERPRET else _COLUMNS
    chunks = triton.next_power_of_2(triton.cdiv(num_partials, _PARTIALS))
    launch_one(_add_partials_kernel, triton.cdiv(length, tile), sums.device,
               partials, sums, scalars, num_partials, length,
               CHUNKS=chunks, PARTIALS=_PARTIALS, TILE=tile, num_warps=_NUM_WARPS)  # fmt: skip


def check_slice(
    grad: torch.Tensor, shape: Sequence[int], start: int, scalars: torch.Tensor, moments: Moments
) -> tuple[int, int, int]:
    """Refuses what does not fit; batches, rows and columns of the parameter."""
    numel, whole = grad.numel(), math.prod(shape)
    check("grad", grad, GRADIENTS, numel, grad.device)
    check("scalars", scalars, (torch.float32,), NUM_SCALARS, grad.device)
    if not 0 <= start <= whole - numel:
        raise ValueError(f"start={start!r}: {numel} elements must lie in a parameter of shape {tuple(shape)}")
    if len(shape) < 2:
        geometry, sizes = (1, 1, whole), {"variance": whole}
    else:
        geometry = batches, rows, columns = math.prod(shape[:-2]), shape[-2], shape[-1]
        sizes = {"row_var": batches * rows, "col_var": batches * columns}
    if len(shape) >= 2 and max(geometry[1:]) >= 2**31:
        raise ValueError(f"shape={tuple(shape)}: rows and columns must be fewer than 2 ** 31")
    if len(moments) != len(sizes):
        raise ValueError(f"moments: {len(moments)} tensors; shape {tuple(shape)} needs {' and '.join(sizes)}")
    for (name, size), moment in zip(sizes.items(), moments, strict=True):
        check(name, moment, (torch.float32,), size, grad.device)
    return geometry
