#!/usr/bin/env python3
"""Lion, one step of a shard with bf16 gradients and weights: the fused kernel beside a copy (torch has no Lion).

python kernels/benchmarks/benchmark_lion.py
TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_lion.py --device cpu --sizes 4096 --repeats 3
"""

from __future__ import annotations

from functools import partial

import torch
from harness import Contestant, arguments, benchmark, fused, new_gradient


def contestants(numel: int, device: torch.device) -> list[Contestant]:
    """The kernel with fp32 masters and with 16-bit remainders."""
    from hift_kernels.lion import lion_step

    return fused(partial(lion_step, beta1=0.9, beta2=0.99), new_gradient(numel, device))


if __name__ == "__main__":
    benchmark("lion", arguments(__doc__), contestants)
