#!/usr/bin/env python3
"""Adafactor, one step of a matrix with bf16 gradients and weights: the fused passes beside the eager rule and torch.

    python kernels/benchmarks/benchmark_adafactor.py
    TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_adafactor.py --device cpu --sizes 4096 --repeats 3

Passes, eager rule: unscaled and clipped gradient to model weights. The chain: unscale, norm, clip, step, cast to bf16.
Bytes per parameter are what the fused passes move, so that GB/s and the share of a copy compare times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Contestant, arguments, benchmark, chain, new_gradient, new_weights, prepared_scalars

EPS1, EPS2, LR = 2.0**-23, 1e-3, 1e-2
MAX_COLUMNS = 4096


def contestants(numel: int, device: torch.device) -> list[Contestant]:
    """The passes with fp32 masters and with 16-bit remainders, the eager rule, and torch one tensor at a time."""
    grad = new_gradient(numel, device)
    columns = next(n for n in range(min(MAX_COLUMNS, numel), 0, -1) if numel % n == 0 and (n % 16 == 0 or n < 16))
    shape = (numel // columns, columns)

    def with_torch(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(params, lr=LR, weight_decay=0.01, foreach=False)

    return [
        _passes(grad, shape, "fp32"), _passes(grad, shape, "split16"), _eager(grad, shape),
        chain("torch Adafactor", 20, with_torch, grad, shape),
    ]  # fmt: skip


def _passes(grad: torch.Tensor, shape: tuple[int, int], form: str) -> Contestant:
    from hift_kernels.adafactor import adafactor_step, add_squares, add_update_square, add_weight_square, coefficients

    def make() -> Callable[[], None]:
        device = grad.device
        weights, scalars = new_weights(grad.numel(), device, form), prepared_scalars(device)
        moments = tuple(torch.zeros(n, device=device) for n in shape)
        numels = torch.tensor([grad.numel()], device=device)

        def run() -> None:
            sums = tuple(torch.zeros_like(moment) for moment in moments)
            squares = torch.zeros(2, 1, dtype=torch.float64, device=device)
            add_squares(grad, shape, 0, scalars, sums)
            for moment, total, count in zip(moments, sums, reversed(shape), strict=True):
                moment.lerp_(total.div_(count), 0.1)
            row_mean = moments[0].mean(dim=0, keepdim=True).clamp_(min=EPS1)
            add_weight_square(weights, squares[0], 0)
            add_update_square(grad, shape, 0, scalars, moments, row_mean, squares[1], 0, eps1=EPS1)
            coefficient = coefficients(*squares, numels, LR, 10, eps2=EPS2, threshold=1.0)
            adafactor_step(grad, weights, shape, 0, scalars, moments, row_mean, coefficient, 0, eps1=EPS1)

        return run

    weight_bytes = 10 if form == "fp32" else 8
    return Contestant(f"hift_kernels {form} master", 2 + 4 + 2 + 2 + weight_bytes, make)


def _eager(grad: torch.Tensor, shape: tuple[int, int]) -> Contestant:
    from hift_ds.rules.adafactor import Adafactor
    from hift_ds.shards import Segment

    def make() -> Callable[[], None]:
        rule, group = Adafactor(), {"weight_decay": 0.01}
        segments = [Segment("weight", torch.Size(shape), 0, grad.numel(), 0, grad.numel())]
        extra = {name: tensor.to(grad.device) for name, tensor in rule.init_extra(segments, group).items()}
        weight, master = torch.zeros_like(grad), torch.zeros_like(grad, dtype=torch.float32)

        def run() -> None:
            rule.update_run(
                lambda write: iter([(0, master)]), grad.float(), group, lr=LR, step=10, segments=segments, extra=extra,
                all_reduce=lambda tensor: None,
            )  # fmt: skip
            weight.copy_(master)

        return run

    return Contestant("the eager rule", 20, make)


if __name__ == "__main__":
    benchmark("adafactor", arguments(__doc__), contestants)
