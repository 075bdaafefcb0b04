#!/usr/bin/env python3
"""AdamW, one step of a shard with bf16 gradients and weights: the fused kernel beside what is used today.

    python kernels/benchmarks/benchmark_adamw.py
    TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_adamw.py --device cpu --sizes 4096 --repeats 3

"chain" is a whole step: unscale, norm, clip, update, cast to bf16. Bytes per parameter are what the fused kernel moves;
for the others they are counted alike, so that GB/s and the share of a copy compare times.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from harness import Contestant, Missing, arguments, benchmark, chain, new_gradient, new_weights, prepared_scalars

HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
TORCH_HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
FORMS = (
    ("fp32", torch.float32), ("split16", torch.float32), ("split16", torch.bfloat16), ("none", torch.bfloat16),
)  # fmt: skip


def contestants(numel: int, device: torch.device) -> list[Contestant]:
    """The kernel in each form, torch's and DeepSpeed's chains, and a compiled eager rule, on tensors of their own."""
    grad = new_gradient(numel, device)
    return [
        *(_fused(grad, form, dtype) for form, dtype in FORMS),
        _fused(grad, "fp32", torch.float32, whole_step=True),
        chain("torch AdamW(fused=True)", 30, lambda params: torch.optim.AdamW(params, **TORCH_HYPER, fused=True), grad),
        chain("DeepSpeed FusedAdam", 30, _deepspeed_adam, grad),
        _compiled_rule(grad),
    ]


def _fused(grad: torch.Tensor, form: str, dtype: torch.dtype, whole_step: bool = False) -> Contestant:
    from hift_kernels.adamw import adamw_step
    from hift_kernels.grad_norm import sum_of_squares

    def make() -> Callable[[], None]:
        weights, scalars = new_weights(grad.numel(), grad.device, form), prepared_scalars(grad.device)
        moments = [torch.zeros_like(grad, dtype=dtype) for _ in range(2)]
        square = torch.zeros(1, dtype=torch.float64, device=grad.device)

        def run() -> None:
            if whole_step:
                sum_of_squares(grad, square)
                prepared_scalars(grad.device, square, scalars)
            adamw_step(grad, weights, *moments, scalars, **HYPER, seed=1)

        return run

    weight_bytes = {"fp32": 4 + 4 + 2, "split16": 8, "none": 4}[form]
    bytes_moved = 2 + weight_bytes + 4 * dtype.itemsize + (2 if whole_step else 0)
    name = f"hift_kernels {form} master, {str(dtype).removeprefix('torch.')} moments"
    return Contestant(name + (" (chain)" if whole_step else ""), bytes_moved, make)


def _deepspeed_adam(params: list[torch.nn.Parameter]) -> Any:
    if params[0].device.type != "cuda":
        raise Missing("needs CUDA")
    # An image's list may have architectures, as 10.0a, that DeepSpeed's builder does not understand.
    os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability(params[0].device))
    try:
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(params, **TORCH_HYPER)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, no nvcc
        raise Missing(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def _compiled_rule(grad: torch.Tensor) -> Contestant:
    from hift_ds.config.optimizers import rule_from_config

    def make() -> Callable[[], None]:
        if grad.device.type != "cuda":
            raise Missing("needs CUDA")
        rule, group = rule_from_config("AdamW", {"lr": TORCH_HYPER["lr"], "weight_decay": 0.01})
        weight, master = torch.zeros_like(grad), torch.zeros_like(grad, dtype=torch.float32)
        state = {slot: torch.zeros_like(master) for slot in rule.slots(group)}

        @torch.compile
        def step(master: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> None:
            rule.update(master, grad.float(), state, group, lr=TORCH_HYPER["lr"], step=10)
            weight.copy_(master)

        return lambda: step(master, grad, weight)

    return Contestant("torch.compile of the eager rule", 28, make)


if __name__ == "__main__":
    benchmark("adamw", arguments(__doc__), contestants)
