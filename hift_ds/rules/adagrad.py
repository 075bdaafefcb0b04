"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hift_ds.rules.base import Rule, check_number, refuse_flags

if TYPE_CHECKING:
    from hift_kernels.launching import Weights


class Adagrad(Rule):
    """Adagrad.

    State: `sum`, 4 bytes a parameter. One temporary tensor as long as what is updated.

    eps = 0 needs initial_accumulator_value > 0, or padding and unused rows become 0 / 0.

    Source: Duchi et al., JMLR 12 (2011); order of operations: torch.optim.Adagrad with foreach=False.
    """

    name = "adagrad"

    def slots(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    def initial_value(self, slot: str, group: Mapping[str, Any]) -> float:
        return float(self.read(group, "initial_accumulator_value"))

    def defaults(self) -> dict[str, Any]:
        return {"lr": 1e-2, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0, "initial_accumulator_value": 0.0}

    def check_group(self, group: Mapping[str, Any]) -> None:
        for key in ("lr", "lr_decay", "weight_decay", "initial_accumulator_value"):
            check_number(key, self.read(group, key))
        check_number("eps", self.read(group, "eps"), open_low=self.read(group, "initial_accumulator_value") == 0)
        refuse_flags(group, "amsgrad", "maximize", "differentiable")

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
        weight_decay = float(self.read(group, "weight_decay"))
        if weight_decay != 0:
            grad.add_(master, alpha=weight_decay)
        rate = lr / (1 + (step - 1) * float(self.read(group, "lr_decay")))
        accumulator = state["sum"]
        accumulator.addcmul_(grad, grad, value=1)
        denominator = accumulator.sqrt().add_(float(self.read(group, "eps")))
        master.addcdiv_(grad, denominator, value=-rate)

    def update_fused(
        self,
        grad: torch.Tensor,
        weights: Weights,
        state: Mapping[str, torch.Tensor],
        group: Mapping[str, Any],
        scalars: torch.Tensor,
        seed: int = 0,
    ) -> None:
        from hift_kernels.adagrad import adagrad_step

        adagrad_step(
            grad, weights, state["sum"], scalars, eps=float(self.read(group, "eps")),
            weight_decay=float(self.read(group, "weight_decay")), lr_decay=float(self.read(group, "lr_decay")),
            seed=seed,
        )  # fmt: skip
