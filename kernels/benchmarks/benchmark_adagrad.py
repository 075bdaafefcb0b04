#!/usr/bin/env python3
"""Adagrad, one step of a shard with bf16 gradients and weights: the fused kernel beside torch's chain.

    python kernels/benchmarks/benchmark_adagrad.py
    TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_adagrad.py --device cpu --sizes 4096 --repeats 3

The chain: unscale, norm, clip, step, cast to bf16.
"""

from __future__ import annotations

from functools import partial

import torch
from harness import Contestant, arguments, benchmark, chain, fused, new_gradient


def contestants(numel: int, device: torch.device) -> list[Contestant]:
    """The kernel with fp32 masters and with 16-bit remainders, and torch."""
    from hift_kernels.adagrad import adagrad_step

    def with_torch(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(params, lr=1e-3, weight_decay=0.01, foreach=True)

    grad = new_gradient(numel, device)
    step = partial(adagrad_step, eps=1e-10, weight_decay=0.01)
    return [*fused(step, grad), chain("torch Adagrad", 22, with_torch, grad)]


if __name__ == "__main__":
    benchmark("adagrad", arguments(__doc__), contestants)
