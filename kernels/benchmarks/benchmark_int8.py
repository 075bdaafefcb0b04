#!/usr/bin/env python3
"""AdamW, Lion and SGD with 8-bit moments, one step of a shard with bf16 gradients and weights, a table each.

    python kernels/benchmarks/benchmark_int8.py
    TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_int8.py --device cpu --sizes 4096 --repeats 3

Beside the kernel's fp32 sister, and bitsandbytes' AdamW8bit with the same chain around it, where it is installed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from harness import Contestant, Missing, arguments, benchmark, chain, fused, new_gradient

ADAMW = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
LION = {"beta1": 0.9, "beta2": 0.99}
SGD = {"momentum": 0.9, "weight_decay": 0.01}


def adamw(numel: int, device: torch.device) -> list[Contestant]:
    """The kernel with fp32 masters and with 16-bit remainders, the one with fp32 moments, and bitsandbytes."""
    from hift_kernels.adamw import adamw_step
    from hift_kernels.int8 import adamw_int8_step
    from hift_kernels.quantize import GROUP

    grad = new_gradient(numel, device)
    return [
        *fused(partial(adamw_int8_step, **ADAMW), grad, moments=2, group=GROUP),
        *fused(partial(adamw_step, **ADAMW), grad, moments=2),
        chain("bitsandbytes AdamW8bit", 16, _adamw8bit, grad),
    ]


def lion(numel: int, device: torch.device) -> list[Contestant]:
    """The kernel with fp32 masters and with 16-bit remainders, and the one with an fp32 momentum."""
    from hift_kernels.int8 import lion_int8_step
    from hift_kernels.lion import lion_step
    from hift_kernels.quantize import GROUP

    grad = new_gradient(numel, device)
    return [*fused(partial(lion_int8_step, **LION), grad, group=GROUP), *fused(partial(lion_step, **LION), grad)]


def sgd(numel: int, device: torch.device) -> list[Contestant]:
    """As `lion`."""
    from hift_kernels.int8 import sgd_int8_step
    from hift_kernels.quantize import GROUP
    from hift_kernels.sgd import sgd_step

    grad = new_gradient(numel, device)
    return [*fused(partial(sgd_int8_step, **SGD), grad, group=GROUP), *fused(partial(sgd_step, **SGD), grad)]


def _adamw8bit(params: list[torch.nn.Parameter]) -> Any:
    if params[0].device.type != "cuda":
        raise Missing("needs CUDA")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise Missing(str(error)) from None
    return AdamW8bit(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


if __name__ == "__main__":
    options = arguments(__doc__)
    for contestants in (adamw, lion, sgd):
        benchmark(f"{contestants.__name__}_int8", options, contestants)
