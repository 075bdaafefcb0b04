#!/usr/bin/env python3
"""AdamW, one step of a shard with bf16 gradients and weights: the fused kernel beside what is used today.

    python kernels/benchmarks/benchmark_adamw.py
    TRITON_INTERPRET=1 python kernels/benchmarks/benchmark_adamw.py --device cpu --sizes 4096 --repeats 3

"chain" is a whole step: unscale, norm, clip, update, cast to bf16. Bytes per parameter are what the fused kernel moves;
for the others they are counted alike, so that GB/s and the share of a copy compare times.
"""

from __future__ import annotations

import torch
from harness import Contestant, arguments, benchmark, new_weights, prepared_scalars, torch_chain

HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
LR = 1e-3


def contestants(numel: int, device: torch.device) -> list[Contestant]:
    """The kernel in each form, and torch's and DeepSpeed's chains, on tensors of their own."""
    grad = torch.randn(numel, device=device).to(torch.bfloat16)
    found = [_fused(numel, device, grad, form, moments) for form, moments in (
        ("fp32", torch.float32), ("split16", torch.float32), ("split16", torch.bfloat16), ("none", torch.bfloat16),
        ("kahan", torch.bfloat16),
    )]  # fmt: skip
    found.append(_fused_int8(numel, device, grad))
    found.append(_fused(numel, device, grad, "fp32", torch.float32, whole_step=True))
    found.append(_torch_chain(numel, device, grad))
    found.append(_deepspeed_chain(numel, device, grad))
    found.append(_compiled_rule(numel, device, grad))
    return found


def _fused(
    numel: int, device: torch.device, grad: torch.Tensor, form: str, dtype: torch.dtype, whole_step: bool = False
) -> Contestant:
    from hift_kernels.adamw import adamw_step
    from hift_kernels.grad_norm import sum_of_squares

    weights, scalars = new_weights(numel, device, form), prepared_scalars(device)
    moments = [torch.zeros(numel, dtype=dtype, device=device) for _ in range(2)]
    square = torch.zeros(1, dtype=torch.float64, device=device)

    def run() -> None:
        if whole_step:
            sum_of_squares(grad, square)
            prepared_scalars(device, square, scalars)
        adamw_step(grad, weights, *moments, scalars, **HYPER, seed=1)

    weight_bytes = {"fp32": 4 + 4 + 2, "split16": 8, "none": 4, "kahan": 8}[form]
    bytes_moved = 2 + weight_bytes + 4 * moments[0].element_size() + (2 if whole_step else 0)
    name = f"hift_kernels {form} master, {str(dtype).removeprefix('torch.')} moments"
    return Contestant(name + (" (chain)" if whole_step else ""), bytes_moved, run)


def _fused_int8(numel: int, device: torch.device, grad: torch.Tensor) -> Contestant:
    from hift_kernels.adamw_int8 import GROUP, adamw_int8_step

    weights, scalars = new_weights(numel, device, "fp32"), prepared_scalars(device)
    codes = [torch.zeros(numel, dtype=torch.uint8, device=device) for _ in range(2)]
    scales = [torch.zeros(-(-numel // GROUP), device=device) for _ in range(2)]
    return Contestant("hift_kernels fp32 master, int8 moments", 2 + 10 + 4 + 16 / GROUP,
                      lambda: adamw_int8_step(grad, weights, *codes, *scales, scalars, **HYPER))  # fmt: skip


def _torch_chain(numel: int, device: torch.device, grad: torch.Tensor) -> Contestant:
    weight = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    master = torch.nn.Parameter(weight.float())
    optimizer = torch.optim.AdamW([master], lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True)
    return Contestant("torch AdamW(fused=True) (chain)", 30, torch_chain(optimizer, master, weight, grad))


def _deepspeed_chain(numel: int, device: torch.device, grad: torch.Tensor) -> Contestant:
    name = "DeepSpeed FusedAdam (chain)"
    if device.type != "cuda":
        return Contestant(name, 30, None, "needs CUDA")
    weight = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    master = torch.nn.Parameter(weight.float())
    try:
        from deepspeed.ops.adam import FusedAdam

        optimizer = FusedAdam([master], lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    except Exception as error:  # no compiler, no nvcc
        return Contestant(name, 30, None, str(error).splitlines()[0])
    return Contestant(name, 30, torch_chain(optimizer, master, weight, grad))


def _compiled_rule(numel: int, device: torch.device, grad: torch.Tensor) -> Contestant:
    from hift_ds.rules import rule_from_config

    name = "torch.compile of the eager rule"
    if device.type != "cuda":
        return Contestant(name, 28, None, "needs CUDA")
    rule, group = rule_from_config("AdamW", {"lr": LR, "weight_decay": 0.01})
    weight, master = torch.zeros(numel, dtype=torch.bfloat16, device=device), torch.zeros(numel, device=device)
    state = {slot: torch.zeros(numel, device=device) for slot in rule.slots(group)}

    @torch.compile
    def step(master: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> None:
        rule.update(master, grad.float(), state, group, lr=LR, step=10)
        weight.copy_(master)

    return Contestant(name, 28, lambda: step(master, grad, weight))


if __name__ == "__main__":
    benchmark("adamw", arguments(__doc__), contestants)
