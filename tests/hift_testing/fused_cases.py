"""Buffers for the fused kernels: random values of wide spread, guarded ends, and their numpy twins.

They are on the CPU (interpreted), or where HIFT_TEST_DEVICE says: `make gpu` runs the same tests on CUDA, compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from hift_kernels.grad_norm import STEP, prepare
from hift_kernels.launching import NUM_SCALARS, Weights
from hift_kernels.quantize import GROUP
from hift_testing import fused_oracle
from hift_testing.reference import LionByHand

DEVICE = torch.device(os.environ.get("HIFT_TEST_DEVICE", "cpu"))
GUARD = 64  # elements behind each buffer that no kernel may touch
SIZES = (0, 1, 15, 16, 17, 4097)
HYPER = {
    "adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
    "sgd": {"momentum": 0.9, "weight_decay": 0.01},
    "lion": {"beta1": 0.9, "beta2": 0.99},
    "adagrad": {"eps": 1e-10, "weight_decay": 0.01, "lr_decay": 0.1},
}
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "lion": ("exp_avg",),
    "adagrad": ("accumulator",),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOMENT_DTYPES = {**DTYPES, "int8": torch.uint8}
MASTER_DTYPES = {"plain": None, "fp32": torch.float32, "split16": torch.int16, "none": None}


class Guarded:
    """A tensor with a guarded end."""

    def __init__(self, values: torch.Tensor) -> None:
        self.whole = torch.cat([values, torch.full((GUARD,), 77, dtype=values.dtype)]).to(DEVICE)
        self.tensor = self.whole[: values.numel()]

    def is_whole(self) -> bool:
        return bool((self.whole[self.tensor.numel() :] == 77).all())


class Shard:
    """A shard's buffers on the CPU, with master weights in one of the forms.

    Args:
        form: As hift_kernels.launching.Weights.
        numel: Elements.
        moments: Names of the moments, and their dtype; `int8`: codes, and scales as more moments.
        start: fp32 master weights at the start; `None` draws them.
    """

    def __init__(
        self,
        form: str,
        numel: int,
        moments: tuple[str, ...],
        *,
        weight_dtype: str = "bf16",
        moment_dtype: str = "fp32",
        start: torch.Tensor | None = None,
    ) -> None:
        start = torch.randn(numel, generator=torch.Generator().manual_seed(1)) if start is None else start
        weight = start.to(DTYPES["fp32" if form == "plain" else weight_dtype])
        if form in ("none", "split16"):
            start = weight.float()
        self.weight = Guarded(weight)
        self.master = None
        if form == "fp32":
            self.master = Guarded(start.clone())
        elif MASTER_DTYPES[form] is not None:
            self.master = Guarded(torch.zeros(numel, dtype=MASTER_DTYPES[form]))
        self.weights = Weights(form, self.weight.tensor, None if self.master is None else self.master.tensor)
        self.moments = {name: Guarded(torch.zeros(numel, dtype=MOMENT_DTYPES[moment_dtype])) for name in moments}
        if moment_dtype == "int8":
            self.moments |= {f"{name}_scale": Guarded(torch.zeros(-(-numel // GROUP))) for name in moments}
        self.scalars = torch.zeros(NUM_SCALARS, device=DEVICE)
        self.start = start

    def step(
        self,
        function: Callable,
        grad: torch.Tensor,
        hyper: dict,
        *,
        lr: float,
        divisor: float = 1.0,
        max_norm: float = 0.0,
        seed: int = 0,
        quick: bool = False,
        **options: Any,
    ) -> None:
        """Prepares the scalars and runs `function`, a launcher.

        Args:
            quick: Take the scalars from the oracle: interpreted, `prepare` costs as much as an update.
        """
        square = grad.double().square().sum().item()
        prepared = {
            "lr": lr, "beta1": hyper.get("beta1", 0.0), "beta2": hyper.get("beta2", 0.0), "max_norm": max_norm,
            "weight_decay": hyper.get("weight_decay", 0.01), "bias_correction": "beta1" in hyper and "eps" in hyper,
        }  # fmt: skip
        if quick:
            values = fused_oracle.scalars(square, divisor, self.scalars[STEP].item(), **prepared)
            self.scalars[: len(values)] = torch.tensor(list(values.values()), dtype=torch.float64).float()
        else:
            prepare(fp64(square), fp64(divisor), self.scalars, **prepared)
        moments = {name: guarded.tensor for name, guarded in self.moments.items()}
        function(grad.to(DEVICE), self.weights, scalars=self.scalars, **moments, **hyper, seed=seed, **options)
        assert all(guarded.is_whole() for guarded in self._all()), "a kernel wrote behind the end of a buffer"

    def master_fp32(self) -> torch.Tensor:
        """The master weight that the buffers stand for, on the CPU."""
        weight, form = self.weight.tensor.cpu(), self.weights.form
        second = None if self.master is None else self.master.tensor.cpu().clone()
        if form == "fp32":
            return second
        if form == "split16":
            return ((weight.view(torch.int16).to(torch.int32) << 16) + second.to(torch.int32)).view(torch.float32)
        return weight.float()

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of everything that an update may change."""
        return [guarded.whole.clone() for guarded in self._all()]

    def _all(self) -> list[Guarded]:
        return [self.weight, *([] if self.master is None else [self.master]), *self.moments.values()]


def gradient(numel: int, step: int, dtype: str = "fp32", decades: float = 6.0) -> torch.Tensor:
    """Gradients whose scale spreads over `decades`, each element's the same at every step."""
    scales = 10.0 ** (-decades * torch.rand(numel, generator=torch.Generator().manual_seed(2)))
    noise = torch.randn(numel, generator=torch.Generator().manual_seed(1000 + step))
    return (noise * scales).to(DTYPES[dtype])


def awkward_gradient(dtype: str) -> torch.Tensor:
    """Zeros of both signs, denormals, the smallest normal and large values."""
    tiny = torch.finfo(DTYPES[dtype]).tiny
    values = [0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 2, 1e-30, 1.0, -3e4, 6e4]
    return torch.tensor(values * 5, dtype=torch.float32).to(DTYPES[dtype])


def torch_run(
    rule: str, start: torch.Tensor, grads: Iterable[torch.Tensor], lr: float, dtype: torch.dtype, **hyper: Any
) -> torch.Tensor:
    """Masters by torch.optim (Lion: by hand) in `dtype`."""
    if "beta1" in hyper:
        hyper["betas"] = (hyper.pop("beta1"), hyper.pop("beta2"))
    param = torch.nn.Parameter(start.to(dtype, copy=True))
    if rule == "lion":
        optimizer: torch.optim.Optimizer = LionByHand([param], lr=lr, weight_decay=0.01, **hyper)
    else:
        classes = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
        optimizer = classes[rule]([param], lr=lr, foreach=False, **hyper)
    for grad in grads:
        param.grad = grad.to(dtype)
        optimizer.step()
    return param.detach()


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """An fp32 copy."""
    return tensor.detach().float().cpu().numpy().copy()


def fp64(value: float) -> torch.Tensor:
    """One fp64 element, as `prepare` takes it."""
    return torch.tensor([value], dtype=torch.float64, device=DEVICE)
