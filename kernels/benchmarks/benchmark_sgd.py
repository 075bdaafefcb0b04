#!/usr/bin/env python3
"""SGD with momentum, one step of a shard with bf16 gradients and weights: the fused kernel beside torch's chain.

    python kernels/benchmarks/benchmark_sgd.py
    TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_sgd.py --device cpu --sizes 4096 --repeats 3

The chain: unscale, norm, clip, step, cast to bf16.
"""

from __future__ import annotations

import torch
from harness import Contestant, arguments, benchmark, new_weights, prepared_scalars, torch_chain


def contestants(numel: int, device: torch.device) -> list[Contestant]:
    """The kernel with fp32 masters and with 16-bit remainders, and torch."""
    grad = torch.randn(numel, device=device).to(torch.bfloat16)
    found = [_fused(numel, device, grad, form) for form in ("fp32", "split16")]
    found.append(_torch_chain(numel, device, grad))
    return found


def _fused(numel: int, device: torch.device, grad: torch.Tensor, form: str) -> Contestant:
    from hift_kernels.sgd import sgd_step

    weights, scalars = new_weights(numel, device, form), prepared_scalars(device)
    moment = torch.zeros(numel, device=device)
    bytes_moved = 2 + 8 + (10 if form == "fp32" else 8)
    return Contestant(f"hift_kernels {form} master", bytes_moved,
                      lambda: sgd_step(grad, weights, moment, scalars, momentum=0.9, weight_decay=0.01))  # fmt: skip


def _torch_chain(numel: int, device: torch.device, grad: torch.Tensor) -> Contestant:
    weight = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    master = torch.nn.Parameter(weight.float())
    optimizer = torch.optim.SGD([master], lr=1e-3, momentum=0.9, weight_decay=0.01, fused=True)
    return Contestant("torch SGD (chain)", 22, torch_chain(optimizer, master, weight, grad))


if __name__ == "__main__":
    benchmark("sgd", arguments(__doc__), contestants)
