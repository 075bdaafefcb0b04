"""SGD, plain, with momentum, and with Nesterov's momentum."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hift_ds.rules.base import Group, Rule, Tensors, check_bool, check_number, refuse_flags


class SGD(Rule):
    """Stochastic gradient descent.

    State: none, or with momentum `momentum_buffer`, 4 bytes a parameter. No temporary tensors.

    Source: order of operations: torch.optim.SGD with foreach=False; the first buffer is the gradient, undamped.
    """

    name = "sgd"
    moments = ("fp32", "bf16", "int8")

    def slots(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.read(group, "momentum") != 0 else ()

    def defaults(self) -> dict[str, Any]:
        return {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}

    def check_group(self, group: Group) -> None:
        momentum, dampening = self.read(group, "momentum"), self.read(group, "dampening")
        nesterov = self.read(group, "nesterov")
        check_number("lr", self.read(group, "lr"))
        check_number("momentum", momentum)
        check_number("dampening", dampening, low=-math.inf)
        check_number("weight_decay", self.read(group, "weight_decay"))
        check_bool("nesterov", nesterov)
        refuse_flags(group, "maximize", "differentiable")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                f"nesterov={nesterov!r} with momentum={momentum!r}, dampening={dampening!r}: needs momentum > 0 and "
                "dampening 0; set them or turn nesterov off."
            )

    def update(self, master: Tensor, grad: Tensor, state: Tensors, group: Group, *, lr: float, step: int) -> None:
        momentum = self.number(group, "momentum")
        weight_decay = self.number(group, "weight_decay")
        if weight_decay != 0:
            grad.add_(master, alpha=weight_decay)
        direction = grad
        if momentum != 0:
            buffer = state["momentum_buffer"]
            if step == 1:
                buffer.copy_(grad)
            else:
                buffer.mul_(momentum).add_(grad, alpha=1 - self.number(group, "dampening"))
            direction = grad.add_(buffer, alpha=momentum) if self.read(group, "nesterov") else buffer
        master.add_(direction, alpha=-lr)

    def fused(self, group: Group, int8: bool) -> Callable[..., None]:
        from hift_kernels.int8 import sgd_int8_step
        from hift_kernels.sgd import sgd_step

        numbers = self.numbers(group, "momentum", "dampening", "weight_decay")
        return partial(sgd_int8_step if int8 else sgd_step, nesterov=bool(self.read(group, "nesterov")), **numbers)
