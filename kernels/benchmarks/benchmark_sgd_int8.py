#!/usr/bin/env python3
"""SGD with 8-bit momentum, one step of a shard with bf16 gradients and weights: the kernel beside its fp32 sister.

    python kernels/benchmarks/benchmark_sgd_int8.py
    TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_sgd_int8.py --device cpu --sizes 4096 --repeats 3
"""

from __future__ import annotations

from functools import partial

import torch
from harness import Contestant, arguments, benchmark, new_gradient, one_moment

HYPER = dict(momentum=0.9, weight_decay=0.01)


def contestants(numel: int, device: torch.device) -> list[Contestant]:
    """The kernel with fp32 masters and with 16-bit remainders, and the one with an fp32 momentum."""
    from hift_kernels.quantize import GROUP
    from hift_kernels.sgd import sgd_step
    from hift_kernels.sgd_int8 import sgd_int8_step

    grad = new_gradient(numel, device)
    return [
        *one_moment(partial(sgd_int8_step, **HYPER), numel, device, grad, GROUP),
        *one_moment(partial(sgd_step, **HYPER), numel, device, grad),
    ]


if __name__ == "__main__":
    benchmark("sgd_int8", arguments(__doc__), contestants)
