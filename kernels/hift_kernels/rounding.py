"""Bits in and out: widening, rounding to nearest, stochastic rounding, and the forms of a master weight.

Every helper gives the same bits compiled and interpreted. In Triton's interpreter a cast from fp32 to bf16 truncates,
bf16 arithmetic works on raw bits and bf16 subnormals widen wrongly, so bf16 is only ever moved as integers there.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language import core  # whose mul is not in triton.language before Triton 3.6

# Read when a kernel is decorated: TRITON_INTERPRET must be set before this package (and triton) is imported.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
NUM_WARPS = 4
# 4 elements a thread: 16- and 32-bit buffers then share one layout (8 would go through shared memory). The interpreter
# pays per program, not per element.
TILE = 65536 if INTERPRET else 4 * 32 * NUM_WARPS
ALIGNMENT = 16  # elements: a length that is a multiple of it is what lets Triton use 128-bit accesses

# Forms of a master weight (constexpr MASTER of the kernels):
PLAIN = tl.constexpr(0)  # the fp32 model weight is its own master
COPY = tl.constexpr(1)  # an fp32 master beside the model weight
SPLIT16 = tl.constexpr(2)  # bf16 model weight + 16-bit remainder = the fp32 master
STOCHASTIC = tl.constexpr(3)  # the bf16 model weight alone


@triton.jit
def widen(x):
    """16- or 32-bit floats to fp32, exactly."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def bf16_of(bits):
    """The bf16 whose bits are the low half of a uint32."""
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def bf16_nearest(x, INTERPRETED: tl.constexpr):
    """fp32 to bf16, to nearest even."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bf16_of(tl.where(x != x, 0x7FC0, rounded))
    else:
        return x.to(tl.bfloat16)


@triton.jit
def bf16_stochastic(x, random16):
    """fp32 to one of the two bf16 around it, the nearer the likelier; inf and nan as they are.

    random16: uint32, uniform in [0, 65535].
    """
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    # A NaN with its payload in the low half alone must not become an infinity.
    kept = tl.where(x != x, bits | 0x400000, bits)
    return bf16_of(tl.where(finite, bits + random16, kept) >> 16)


@triton.jit
def random32(offsets, seed, STREAM: tl.constexpr):
    """32 mixed bits for each (offset, seed, stream). Source: "lowbias32", C. Wellons's hash of two multiplications."""
    h = offsets.to(tl.uint32) ^ seed.to(tl.uint32, bitcast=True) ^ (STREAM * 0x632BE5AB)
    h = h ^ (h >> 16)
    h = core.mul(h, 0x7FEB352D, sanitize_overflow=False)
    h = h ^ (h >> 15)
    h = core.mul(h, 0x846CA68B, sanitize_overflow=False)
    return h ^ (h >> 16)


def mixed_seed(*parts: int) -> int:
    """A signed 32-bit seed that depends on every bit of `parts` (run's seed, step, block, rank ...).

    Seeds that follow one another would give neighbouring elements each other's draws. Source: splitmix64.
    """
    state = 0
    for part in parts:
        state = (state ^ part) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return (state & 0xFFFFFFFF) - 0x80000000


@triton.jit
def store_rounded(ptr, x, mask, random16, STOCHASTICALLY: tl.constexpr, INTERPRETED: tl.constexpr):
    """Stores fp32 in the buffer's dtype; bf16 stochastically if asked to, all else to nearest even."""
    if ptr.dtype.element_ty == tl.bfloat16:
        if STOCHASTICALLY:
            tl.store(ptr, bf16_stochastic(x, random16), mask=mask)
        else:
            tl.store(ptr, bf16_nearest(x, INTERPRETED), mask=mask)
    else:
        tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_master(weight_ptr, master_ptr, offsets, mask, MASTER: tl.constexpr):
    """The master weight in fp32."""
    if MASTER == COPY:
        master = tl.load(master_ptr + offsets, mask=mask)
    elif MASTER == SPLIT16:
        weight = tl.load(weight_ptr + offsets, mask=mask)
        low = tl.load(master_ptr + offsets, mask=mask).to(tl.int32).to(tl.uint32, bitcast=True)
        master = ((weight.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) + low).to(tl.float32, bitcast=True)
    else:
        master = widen(tl.load(weight_ptr + offsets, mask=mask))
    return master


@triton.jit
def store_master(
    weight_ptr, master_ptr, offsets, old, new, random16, mask, stored, MASTER: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Stores the new master weight in its form, and the model weight.

    mask: the tile's elements; stored: those whose update is not left out (`store_mask`). With COPY a model weight is
    written in any case, then from the old master: it need not have been there before.
    """
    if MASTER == COPY:
        tl.store(master_ptr + offsets, new, mask=stored)
        store_rounded(weight_ptr + offsets, tl.where(stored, new, old), mask, random16, False, INTERPRETED)
    elif MASTER == SPLIT16:
        # Half up, not to even: then the remainder fits 16 bits with its sign. The two halves are the fp32, bit by bit.
        bits = new.to(tl.uint32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(weight_ptr + offsets, bf16_of(high), mask=stored)
        tl.store(master_ptr + offsets, (bits - (high << 16)).to(tl.int32, bitcast=True).to(tl.int16), mask=stored)
    elif MASTER == STOCHASTIC:
        store_rounded(weight_ptr + offsets, new, stored, random16, True, INTERPRETED)
    else:
        tl.store(weight_ptr + offsets, new, mask=stored)


@triton.jit
def store_mask(mask, offsets, found_inf):
    """Nothing is stored where a gradient was not finite. A mask: a branch would hold the loads back behind it."""
    # Compared as a tile: the interpreter would give a compared scalar its operands' dtype. Built of zeros, not of the
    # mask: what the compiler cannot see to be the same for neighbours makes every store scalar.
    return mask & ((tl.zeros_like(offsets).to(tl.float32) + found_inf) == 0.0)
