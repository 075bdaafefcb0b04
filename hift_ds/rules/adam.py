"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hift_ds.rules.base import Rule, check_betas, check_bool, check_number, refuse_flags

if TYPE_CHECKING:
    from hift_kernels.launching import Weights


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

    def slots(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def defaults(self) -> dict[str, Any]:
        return {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True}

    def check_group(self, group: Mapping[str, Any]) -> None:
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

    def update(
        self,
        master: torch.Tensor,
        grad: torch.Tensor,
        state: Mapping[str, torch.Tensor],
        group: Mapping[str, Any],
        *,
        lr: float,
        step: int,
    ) -> None:
        beta1, beta2 = (float(beta) for beta in self.read(group, "betas"))
        weight_decay = float(self.read(group, "weight_decay"))
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
        denominator.div_(bias_correction2_sqrt).add_(float(self.read(group, "eps")))
        master.addcdiv_(exp_avg, denominator, value=-step_size)

    def prepared(self, group: Mapping[str, Any]) -> dict[str, Any]:
        beta1, beta2 = (float(beta) for beta in self.read(group, "betas"))
        corrected = bool(self.read(group, "bias_correction"))
        return {**super().prepared(group), "beta1": beta1, "beta2": beta2, "bias_correction": corrected}

    def update_fused(
        self,
        grad: torch.Tensor,
        weights: Weights,
        state: Mapping[str, torch.Tensor],
        group: Mapping[str, Any],
        scalars: torch.Tensor,
        seed: int = 0,
    ) -> None:
        beta1, beta2 = (float(beta) for beta in self.read(group, "betas"))
        hyper: dict[str, Any] = dict(
            beta1=beta1, beta2=beta2, eps=float(self.read(group, "eps")),
            weight_decay=float(self.read(group, "weight_decay")), decoupled=self.decoupled, seed=seed,
        )  # fmt: skip
        moments = state["exp_avg"], state["exp_avg_sq"]
        if moments[0].dtype == torch.uint8:
            from hift_kernels.int8 import adamw_int8_step

            adamw_int8_step(
                grad, weights, *moments, state["exp_avg_scale"], state["exp_avg_sq_scale"], scalars, **hyper
            )
        else:
            from hift_kernels.adamw import adamw_step

            adamw_step(grad, weights, *moments, scalars, **hyper)
