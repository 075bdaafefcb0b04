"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hift_ds.rules.base import Group, Rule, Tensors, check_betas, check_bool, check_number, refuse_flags


class Adam(Rule):
    """Adam with decoupled weight decay ("adamw") or with weight decay added to the gradient ("adam").

    State: `exp_avg` and `exp_avg_sq`, 8 bytes a parameter. No temporary tensors.

    `weight_decay` defaults to 0, as in the optimizers that DeepSpeed builds from a config (torch's AdamW: 0.01).
    `bias_correction: false` is honoured. eps = 0 is refused: it makes 0 / 0 of padding and of unused rows.

    Source: arXiv 1412.6980, arXiv 1711.05101; order of operations: torch.optim.AdamW with foreach=False.
    """

    moments = ("fp32", "bf16", "int8")

    def __init__(self, decoupled: bool) -> None:
        self.decoupled = decoupled
        self.name = "adamw" if decoupled else "adam"

    def slots(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def defaults(self) -> dict[str, Any]:
        return {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True}

    def check_group(self, group: Group) -> None:
        check_number("lr", self.read(group, "lr"))
        check_betas(self.read(group, "betas"))
        check_number("eps", self.read(group, "eps"), open_low=True)
        check_number("weight_decay", self.read(group, "weight_decay"))
        check_bool("bias_correction", self.read(group, "bias_correction"))
        refuse_flags(group, "amsgrad", "maximize", "differentiable")
        decoupled = group.get("decoupled_weight_decay", self.decoupled)
        if bool(decoupled) != self.decoupled:
            raise ValueError(
                f"decoupled_weight_decay={decoupled!r}: must be {self.decoupled} in every param group, because one "
                "rule updates them all; use one kind of weight decay."
            )

    def update(self, master: Tensor, grad: Tensor, state: Tensors, group: Group, *, lr: float, step: int) -> None:
        beta1, beta2 = map(float, self.read(group, "betas"))
        weight_decay = self.number(group, "weight_decay")
        corrected = bool(self.read(group, "bias_correction"))
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        if weight_decay != 0:
            if self.decoupled:
                master.mul_(1 - lr * weight_decay)
            else:
                grad.add_(master, alpha=weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step_size = lr / (1 - beta1**step if corrected else 1.0)
        bias_correction2_sqrt = (1 - beta2**step) ** 0.5 if corrected else 1.0
        denominator = torch.sqrt(exp_avg_sq, out=grad)  # the gradient is spent: no temporary
        denominator.div_(bias_correction2_sqrt).add_(self.number(group, "eps"))
        master.addcdiv_(exp_avg, denominator, value=-step_size)

    def prepared(self, group: Group) -> dict[str, Any]:
        beta1, beta2 = map(float, self.read(group, "betas"))
        corrected = bool(self.read(group, "bias_correction"))
        return {**super().prepared(group), "beta1": beta1, "beta2": beta2, "bias_correction": corrected}

    def fused(self, group: Group, int8: bool) -> Callable[..., None]:
        from hift_kernels.adamw import adamw_step
        from hift_kernels.int8 import adamw_int8_step

        beta1, beta2 = map(float, self.read(group, "betas"))
        return partial(
            adamw_int8_step if int8 else adamw_step, beta1=beta1, beta2=beta2, decoupled=self.decoupled,
            **self.numbers(group, "eps", "weight_decay"),
        )  # fmt: skip
