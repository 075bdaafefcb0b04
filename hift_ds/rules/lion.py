"""Lion."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hift_ds.rules.base import Group, Rule, Tensors, check_betas, check_number, refuse_flags


class Lion(Rule):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay.

    State: `exp_avg`, 4 bytes a parameter. One temporary tensor as long as what is updated.

    betas default to DeepSpeed's (0.9, 0.999); the paper has (0.9, 0.99).

    Source: arXiv 2302.06675; maths: DeepSpeed's FusedLion and DeepSpeedCPULion, but for an element whose momentum
    and gradient are exactly 0 (padding, a token that never occurs). There FusedLion adds lr and DeepSpeedCPULion
    subtracts it (or adds it, for -0.0) at every step; we leave the element, as the paper's sign(0) = 0 does.
    """

    name = "lion"
    moments = ("fp32", "bf16", "int8")

    def slots(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg",)

    def defaults(self) -> dict[str, Any]:
        return {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}

    def check_group(self, group: Group) -> None:
        check_number("lr", self.read(group, "lr"))
        check_betas(self.read(group, "betas"))
        check_number("weight_decay", self.read(group, "weight_decay"))
        refuse_flags(group, "maximize", "differentiable")

    def update(self, master: Tensor, grad: Tensor, state: Tensors, group: Group, *, lr: float, step: int) -> None:
        beta1, beta2 = map(float, self.read(group, "betas"))
        weight_decay = self.number(group, "weight_decay")
        exp_avg = state["exp_avg"]
        direction = torch.mul(exp_avg, beta1).add_(grad, alpha=1 - beta1).sign_()
        if weight_decay != 0:
            master.mul_(1 - lr * weight_decay)
        master.add_(direction, alpha=-lr)
        exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)

    def fused(self, group: Group, int8: bool) -> Callable[..., None]:
        from hift_kernels.int8 import lion_int8_step
        from hift_kernels.lion import lion_step

        beta1, beta2 = map(float, self.read(group, "betas"))
        return partial(lion_int8_step if int8 else lion_step, beta1=beta1, beta2=beta2)
