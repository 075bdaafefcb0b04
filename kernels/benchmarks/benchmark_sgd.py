#!/usr/bin/env python3
"""SGD with momentum, one step of a shard with bf16 gradients and weights: the fused kernel beside torch's chain.

    python kernels/benchmarks/benchmark_sgd.py
    TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_sgd.py --device cpu --sizes 4096 --repeats 3

The chain: unscale, norm, clip, step, cast to bf16.
"""

from __future__ import annotations

from functools import partial

import torch
from harness import Contestant, arguments, benchmark, chain, fused, new_gradient


def contestants(numel: int, device: torch.device) -> list[Contestant]:
    """The kernel with fp32 masters and with 16-bit remainders, and torch."""
    from hift_kernels.sgd import sgd_step

    def with_torch(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=0.01, fused=True)

    grad = new_gradient(numel, device)
    step = partial(sgd_step, momentum=0.9, weight_decay=0.01)
    return [*fused(step, grad), chain("torch SGD", 22, with_torch, grad)]


if __name__ == "__main__":
    benchmark("sgd", arguments(__doc__), contestants)
