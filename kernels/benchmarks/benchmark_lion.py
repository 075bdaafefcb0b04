#!/usr/bin/env python3
"""Lion, one step of a shard with bf16 gradients and weights: the fused kernel beside a copy (torch has no Lion).

python kernels/benchmarks/benchmark_lion.py
TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_lion.py --device cpu --sizes 4096 --repeats 3
"""

from __future__ import annotations

import torch
from harness import Contestant, arguments, benchmark, new_weights, prepared_scalars


def contestants(numel: int, device: torch.device) -> list[Contestant]:
    """The kernel with fp32 masters and with 16-bit remainders."""
    grad = torch.randn(numel, device=device).to(torch.bfloat16)
    found = [_fused(numel, device, grad, form) for form in ("fp32", "split16")]
    return found


def _fused(numel: int, device: torch.device, grad: torch.Tensor, form: str) -> Contestant:
    from hift_kernels.lion import lion_step

    weights, scalars = new_weights(numel, device, form), prepared_scalars(device)
    moment = torch.zeros(numel, device=device)
    bytes_moved = 2 + 8 + (10 if form == "fp32" else 8)
    return Contestant(f"hift_kernels {form} master", bytes_moved,
                      lambda: lion_step(grad, weights, moment, scalars, beta1=0.9, beta2=0.99))  # fmt: skip


if __name__ == "__main__":
    benchmark("lion", arguments(__doc__), contestants)
