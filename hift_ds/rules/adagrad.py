"""Adagrad."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hift_ds.rules.base import Group, Rule, Tensors, check_number, refuse_flags


class Adagrad(Rule):
    """Adagrad.

    State: `sum`, 4 bytes a parameter. One temporary tensor as long as what is updated.

    eps = 0 needs initial_accumulator_value > 0, or padding and unused rows become 0 / 0.

    Source: Duchi et al., JMLR 12 (2011); order of operations: torch.optim.Adagrad with foreach=False.
    """

    name = "adagrad"

    def slots(self, group: Group) -> tuple[str, ...]:
        return ("sum",)

    def initial_value(self, slot: str, group: Group) -> float:
        return self.number(group, "initial_accumulator_value")

    def defaults(self) -> dict[str, Any]:
        return {"lr": 1e-2, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0, "initial_accumulator_value": 0.0}

    def check_group(self, group: Group) -> None:
        for key in ("lr", "lr_decay", "weight_decay", "initial_accumulator_value"):
            check_number(key, self.read(group, key))
        check_number("eps", self.read(group, "eps"), open_low=self.read(group, "initial_accumulator_value") == 0)
        refuse_flags(group, "amsgrad", "maximize", "differentiable")

    def update(self, master: Tensor, grad: Tensor, state: Tensors, group: Group, *, lr: float, step: int) -> None:
        weight_decay = self.number(group, "weight_decay")
        if weight_decay != 0:
            grad.add_(master, alpha=weight_decay)
        rate = lr / (1 + (step - 1) * self.number(group, "lr_decay"))
        accumulator = state["sum"]
        accumulator.addcmul_(grad, grad, value=1)
        denominator = accumulator.sqrt().add_(self.number(group, "eps"))
        master.addcdiv_(grad, denominator, value=-rate)

    def fused(self, group: Group, int8: bool) -> Callable[..., None]:
        from hift_kernels.adagrad import adagrad_step

        return partial(adagrad_step, **self.numbers(group, "eps", "weight_decay", "lr_decay"))
