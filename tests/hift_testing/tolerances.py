"""The one table of tolerances: how far two runs may be apart, and why that far.

Differences are absolute and of weights (unless the name says otherwise), after at most two rotations at the rates of
`parity.RULES`, on a CPU. "Measured" is the largest that the suite met when the bound was written.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """A bound (inclusive) and its reason."""

    bound: float
    reason: str


EXACT = Tolerance(0.0, "the same operations in the same order")

NORM = Tolerance(
    2e-5,
    "relative, of the gradient norm: the engine sums squares in fp32 and combines ranks in fp64, the reference sums in "
    "fp64; measured 4e-6",
)

TURNED_NORM = Tolerance(
    1e-3,
    "NORM after Lion's second update of a block in bf16: rounding turns the sign of some updates (7e-4 of the "
    "elements), each by twice the rate, and the next block's gradient sees that. Measured 2.8e-4 with torch 2.8, where "
    "the three steps before agree to 1.4e-7, and 4e-6 with 2.13",
)

STAGE3 = Tolerance(
    1e-5,
    "fp32: ZeRO-3's hooks add nodes to the autograd graph, so that the gradient of a tensor with three or more users "
    "(the residual and both uses in an RMSNorm) is summed in another order; forward passes are bit-equal, and with "
    "LayerNorm and in bf16, where two terms meet, the difference is 0. Measured 4.3e-6",
)

STAGE3_RESET = Tolerance(
    1e-4,
    "as STAGE3 with a fresh state at each turn: at its first step Adam divides the gradient by its own size, so noise "
    "d moves a weight by up to lr * d / eps = 1e-3 * 1e-8 / 1e-6 a turn. Measured 1.9e-5",
)

CLIPPED = Tolerance(
    1e-5,
    "fp32: the two norms differ by 1e-6 relative (NORM), which scales every gradient and changes its rounding, and "
    "Adam divides that by |gradient| + eps. Measured 1.3e-6",
)

CLIPPED_STAGE3 = Tolerance(2e-5, "STAGE3 and CLIPPED together. Measured 4.6e-6")

CLIPPED_BF16_SHARE = Tolerance(
    0.02,
    "share of elements that differ at all: CLIPPED moves a few fp32 masters across a rounding boundary of bf16, and "
    "the next gradients see that. Measured 1e-4; an unclipped run differs in 0.9 of all",
)

FOUR_RANKS = Tolerance(
    1e-5,
    "fp32: gloo adds four gradients in another order than the reference, which adds them rank by rank. Measured 7.6e-7",
)

FOUR_RANKS_STAGE3 = Tolerance(2e-5, "STAGE3 and FOUR_RANKS together. Measured 7.6e-7")

ADAFACTOR = Tolerance(
    5e-6, "fp32: row and column means and root mean squares are sums over slices and ranks. Measured 3.6e-7"
)

ONE_BIG_BATCH = Tolerance(
    1e-6, "fp32, of weights after one step of SGD at rate 0.1: a sum over rows is split over micro steps and ranks"
)

FULL_CLIPPED = Tolerance(
    5e-6,
    "fp32, against DeepSpeed's own optimizers: norms of the same gradients differ by 1e-6 relative, as in CLIPPED. "
    "Measured 1.6e-7",
)
