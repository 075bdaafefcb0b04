"""Places in the vector of scalars that `grad_norm.prepare` writes and the update kernels read.

Constexprs, the only globals that Triton compiles in; `hift_kernels.grad_norm` has the same names as plain numbers, for
the host. Imported by name: Triton's cache of compiled kernels does not see a change behind a module's attribute.
"""

from __future__ import annotations

import triton
import triton.language as tl

SCALE = tl.constexpr(0)  # what a gradient is multiplied by: 1 / loss scale, clipped
FOUND_INF = tl.constexpr(1)  # 1 if a gradient is not finite: nothing is stored
STEP_SIZE = tl.constexpr(2)  # lr / Adam's first bias correction
INV_SQRT_BC2 = tl.constexpr(3)  # 1 / root of the second
DECAY = tl.constexpr(4)  # 1 - lr * weight_decay
RATE = tl.constexpr(5)  # lr
NORM = tl.constexpr(6)  # of the unscaled gradient
STEP = tl.constexpr(7)  # updates so far, this one included


@triton.jit
def load_step(scalars_ptr):
    """Updates so far."""
    return tl.load(scalars_ptr + STEP)


@triton.jit
def store_scalars(scalars_ptr, scale, found_inf, step_size, inv_sqrt_bc2, decay, rate, norm, step):
    """Writes the vector, in fp32."""
    tl.store(scalars_ptr + SCALE, scale.to(tl.float32))
    tl.store(scalars_ptr + FOUND_INF, found_inf.to(tl.float32))
    tl.store(scalars_ptr + STEP_SIZE, step_size.to(tl.float32))
    tl.store(scalars_ptr + INV_SQRT_BC2, inv_sqrt_bc2.to(tl.float32))
    tl.store(scalars_ptr + DECAY, decay.to(tl.float32))
    tl.store(scalars_ptr + RATE, rate.to(tl.float32))
    tl.store(scalars_ptr + NORM, norm.to(tl.float32))
    tl.store(scalars_ptr + STEP, step.to(tl.float32))
