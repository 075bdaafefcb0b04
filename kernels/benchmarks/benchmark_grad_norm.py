#!/usr/bin/env python3
"""The gradient's norm and what follows from it, of a bf16 shard: the two kernels beside torch's and DeepSpeed's ways.

python kernels/benchmarks/benchmark_grad_norm.py
TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_grad_norm.py --device cpu --sizes 4096 --repeats 3
"""

from __future__ import annotations

import torch
from harness import Contestant, arguments, benchmark, new_gradient


def contestants(numel: int, device: torch.device) -> list[Contestant]:
    """The kernels (nothing waits), torch's norm, and DeepSpeed's chain of an overflow check and an fp64 norm."""
    from hift_kernels.grad_norm import prepare, sum_of_squares
    from hift_kernels.launching import NUM_SCALARS

    grad = new_gradient(numel, device)
    square, divisor = (torch.ones(1, dtype=torch.float64, device=device) for _ in range(2))
    scalars = torch.zeros(NUM_SCALARS, device=device)

    def fused() -> None:
        sum_of_squares(grad, square)
        prepare(square, divisor, scalars, lr=1e-3, beta1=0.9, beta2=0.999, max_norm=1.0, bias_correction=True)

    def deepspeed() -> float:
        # Source: what stage_1_and_2.py of DeepSpeed 0.19.8 does in bf16, has_inf_or_nan and get_grad_norm_direct.
        bad = torch.isinf(grad.float()).logical_or(torch.isnan(grad.float())).float().max()
        return bad.item() + grad.double().norm().item()

    def with_torch() -> float:
        return torch.linalg.vector_norm(grad, dtype=torch.float32).item()

    return [
        Contestant("hift_kernels sum_of_squares + prepare", 2, lambda: fused),
        Contestant("torch vector_norm, and a wait", 2, lambda: with_torch),
        Contestant("DeepSpeed's checks and norm", 2, lambda: deepspeed),
    ]


if __name__ == "__main__":
    benchmark("grad_norm", arguments(__doc__), contestants)
