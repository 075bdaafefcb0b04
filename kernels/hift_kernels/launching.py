"""What all launchers share: checks, grid, device, compiler options."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton

from hift_kernels import rounding
from hift_kernels.rounding import INTERPRET, NUM_WARPS, TILE

NUM_SCALARS = 16  # of the vector that grad_norm.prepare writes, padded to 64 bytes

# IEEE results: no contraction of a * b + c, so that a kernel equals a plain fp32 computation bit by bit.
OPTIONS: dict[str, Any] = {} if INTERPRET else {"num_stages": 1, "enable_fp_fusion": False}


def is_available(device_type: str) -> bool:
    """Whether the kernels can run there: on a CUDA device, or anywhere under TRITON_INTERPRET=1."""
    return device_type == "cuda" or INTERPRET


def check(
    name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype], numel: int, device: torch.device
) -> torch.Tensor:
    """Refuses a tensor that a kernel would read or write wrongly.

    Raises:
        ValueError: Another dtype, length or device, or not 1-D and contiguous.
    """
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}.dtype={tensor.dtype}: must be {' or '.join(map(str, dtypes))}")
    if tensor.dim() != 1 or tensor.numel() != numel or not tensor.is_contiguous():
        raise ValueError(f"{name}.shape={tuple(tensor.shape)}: must be contiguous, 1-D, of {numel} elements")
    if tensor.device != device:
        raise ValueError(f"{name}.device={tensor.device}: must be {device}, where the gradient is")
    return tensor


def fp64_halves(value: float) -> tuple[float, float]:
    """`value` as two numbers that fp32 holds exactly, whose fp64 sum is off by at most 2^-48 of it."""
    high = ctypes.c_float(value).value
    return high, ctypes.c_float(value - high).value


def launch_one(
    kernel: Any, num_programs: int, device: torch.device, *args: Any, num_warps: int, **constexprs: Any
) -> None:
    """Runs a kernel on `device`'s current stream."""
    options = {} if INTERPRET else {**OPTIONS, "num_warps": num_warps}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(num_programs,)](*args, **constexprs, **options)


def launch(kernel: Any, numel: int, device: torch.device, *args: Any, **constexprs: Any) -> None:
    """Runs an elementwise kernel over `numel` elements; nothing at all for none."""
    if numel:
        tile = min(TILE, triton.next_power_of_2(numel)) if INTERPRET else TILE
        launch_one(kernel, triton.cdiv(numel, tile), device, *args, TILE=tile, INTERPRETED=INTERPRET,
                   num_warps=NUM_WARPS, **constexprs)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """A shard's model weights and the second buffer that makes them master weights.

    Bytes per parameter of bf16 weights, moved and kept beside the weight's own 2: `fp32` 4 read, 4 + 2 written, 4 kept;
    `split16` 2 + 2 read, 2 + 2 written, 2 kept, bit-equal to `fp32`; `none` (stochastic rounding) 2 read, 2 written,
    nothing kept. `plain` is for fp32 weights: 4 read, 4 written.

    Attributes:
        form: One of `FORMS`.
        weight: The model weights, 1-D: fp32 for `plain`, bf16, fp16 or fp32 for `fp32`, else bf16. With `fp32` they are
            only written.
        master: `fp32`: the fp32 master weights; `split16`: int16 remainders; else `None`.
    """

    form: str
    weight: torch.Tensor
    master: torch.Tensor | None = None

    def check(self, grad: torch.Tensor) -> None:
        """Raises ValueError for an unknown form, and for buffers that do not fit it and the gradient."""
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}: must be one of {', '.join(map(repr, FORMS))}")
        _, weight_dtypes, master_dtype = FORMS[self.form]
        check("weight", self.weight, weight_dtypes, grad.numel(), grad.device)
        if (self.master is None) != (master_dtype is None):
            raise ValueError(f"master: form {self.form!r} needs {'none' if master_dtype is None else master_dtype}")
        if self.master is not None and master_dtype is not None:
            check("master", self.master, (master_dtype,), grad.numel(), grad.device)

    @property
    def constexpr(self) -> int:
        """The form as the kernels take it."""
        return FORMS[self.form][0].value

    @property
    def second(self) -> torch.Tensor:
        """A pointer for the kernels; where there is no second buffer they do not touch it."""
        return self.weight if self.master is None else self.master


HALF = (torch.bfloat16, torch.float16)
GRADIENTS = (*HALF, torch.float32)
# form -> (constexpr MASTER, dtypes of the model weights, dtype of the second buffer)
FORMS = {
    "plain": (rounding.PLAIN, (torch.float32,), None),
    "fp32": (rounding.COPY, GRADIENTS, torch.float32),
    "split16": (rounding.SPLIT16, (torch.bfloat16,), torch.int16),
    "none": (rounding.STOCHASTIC, (torch.bfloat16,), None),
}


def check_update(grad: torch.Tensor, weights: Weights, scalars: torch.Tensor, **moments: torch.Tensor) -> None:
    """The checks that all update rules share; moments are fp32 or bf16.

    Raises:
        ValueError: A tensor of another dtype, length, device or stride.
    """
    check("grad", grad, GRADIENTS, grad.numel(), grad.device)
    weights.check(grad)
    check("scalars", scalars, (torch.float32,), NUM_SCALARS, grad.device)
    for name, moment in moments.items():
        check(name, moment, (torch.float32, torch.bfloat16), grad.numel(), grad.device)
