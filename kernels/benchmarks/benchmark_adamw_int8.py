#!/usr/bin/env python3
"""AdamW with 8-bit moments, one step of a shard with bf16 gradients and weights: the kernel beside its fp32 sister.

    python kernels/benchmarks/benchmark_adamw_int8.py
    TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_adamw_int8.py --device cpu --sizes 4096 --repeats 3

And beside bitsandbytes' AdamW8bit with the same chain around it, where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Contestant, Missing, arguments, benchmark, chain, new_gradient, new_weights, prepared_scalars

HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def contestants(numel: int, device: torch.device) -> list[Contestant]:
    """The kernel with fp32 masters and with 16-bit remainders, AdamW with fp32 moments, and bitsandbytes."""
    grad = new_gradient(numel, device)
    return [
        _int8(grad, "fp32"), _int8(grad, "split16"), _fp32(grad), chain("bitsandbytes AdamW8bit", 16, _adamw8bit, grad),
    ]  # fmt: skip


def _int8(grad: torch.Tensor, form: str) -> Contestant:
    from hift_kernels.adamw_int8 import adamw_int8_step
    from hift_kernels.quantize import GROUP

    def make() -> Callable[[], None]:
        weights, scalars = new_weights(grad.numel(), grad.device, form), prepared_scalars(grad.device)
        codes = [torch.zeros_like(grad, dtype=torch.uint8) for _ in range(2)]
        scales = [torch.zeros(-(-grad.numel() // GROUP), device=grad.device) for _ in range(2)]
        return lambda: adamw_int8_step(grad, weights, *codes, *scales, scalars, **HYPER)

    weight_bytes = 10 if form == "fp32" else 8
    return Contestant(f"hift_kernels {form} master, int8 moments", 2 + weight_bytes + 4 + 16 / GROUP, make)


def _fp32(grad: torch.Tensor) -> Contestant:
    from hift_kernels.adamw import adamw_step

    def make() -> Callable[[], None]:
        weights, scalars = new_weights(grad.numel(), grad.device, "fp32"), prepared_scalars(grad.device)
        moments = [torch.zeros_like(grad, dtype=torch.float32) for _ in range(2)]
        return lambda: adamw_step(grad, weights, *moments, scalars, **HYPER)

    return Contestant("hift_kernels fp32 master, fp32 moments", 28, make)


def _adamw8bit(params: list[torch.nn.Parameter]) -> Any:
    if params[0].device.type != "cuda":
        raise Missing("needs CUDA")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise Missing(str(error)) from None
    return AdamW8bit(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


if __name__ == "__main__":
    benchmark("adamw_int8", arguments(__doc__), contestants)
