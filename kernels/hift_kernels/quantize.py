"""Moments as 8-bit codes, quantised block-wise: what the kernels that keep such moments share.

Each run of `GROUP` elements shares one fp32 scale per moment, the largest magnitude in it. A code is a floating-point
number of seven decades ("dynamic"): decade i = 0..6 holds the values 10^(i-6) (0.1 + 0.9 t / 2^i), t = 1..2^i, so that
the largest has the most codes; one more bit for a moment without sign. In closed form, without a table.

Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hift_kernels.launching import check, launch_one
from hift_kernels.rounding import INTERPRET

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
def fraction_of(value, largest):
    """value / largest in [0, 1]; 0 where largest is."""
    divisor = tl.where(largest > 0.0, largest, 1.0)
    return tl.minimum(tl.div_rn(value, value * 0.0 + divisor), 1.0)


@triton.jit
def groups_of(numel, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """A program's groups and their elements, and which of both there are."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return rows, offsets, rows * GROUP < numel, offsets < numel


@triton.jit
def load_codes(code_ptr, scale_ptr, offsets, rows, mask, row_mask):
    """Codes and scales of the groups `rows`, 0 behind the end; to decode between loads would cost registers."""
    code = tl.load(code_ptr + offsets, mask=mask, other=0).to(tl.int32)
    return code, tl.load(scale_ptr + rows, mask=row_mask, other=0.0)[:, None]


@triton.jit
def decode_signed(code, largest):
    """fp32 of a moment with a sign, which is in the code's highest bit."""
    value = decode(code & 127, 0) * largest
    return tl.where(code > 127, -value, value)


@triton.jit
def encode_signed(value, largest):
    """Codes of a moment with a sign, given the largest magnitude of each group."""
    code = encode(fraction_of(tl.abs(value), largest[:, None]), 0)
    return tl.where(value < 0.0, code | 128, code)


def check_codes(codes: torch.Tensor, scales: torch.Tensor, name: str, numel: int, device: torch.device) -> None:
    """Raises ValueError for uint8 codes or fp32 scales of another dtype, length, device or stride."""
    check(name, codes, (torch.uint8,), numel, device)
    check(f"{name}_scale", scales, (torch.float32,), triton.cdiv(numel, GROUP), device)


def launch_groups(kernel: Any, numel: int, device: torch.device, *args: Any, **constexprs: Any) -> None:
    """Runs a kernel over the groups of `numel` elements; nothing at all for none."""
    if numel:
        num_groups = triton.cdiv(numel, GROUP)
        rows = min(_ROWS, triton.next_power_of_2(num_groups)) if INTERPRET else _ROWS
        launch_one(kernel, triton.cdiv(num_groups, rows), device, *args, ROWS=rows, GROUP=GROUP,
                   INTERPRETED=INTERPRET, num_warps=_NUM_WARPS, **constexprs)  # fmt: skip
