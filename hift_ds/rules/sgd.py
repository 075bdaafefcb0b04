"""SGD, plain, with momentum, and with Nesterov's momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hift_ds.rules.base import Rule, check_bool, check_number, refuse_flags

if TYPE_CHECKING:
    from hift_kernels.launching import Weights


class SGD(Rule):
    """Stochastic gradient descent.

    State: none, or with momentum `momentum_buffer`, 4 bytes a parameter. No temporary tensors.

    Source: order of operations: torch.optim.SGD with foreach=False; the first buffer is the gradient, undamped.
    """

    name = "sgd"
    moments = ("fp32", "bf16", "int8")

    def slots(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.read(group, "momentum") != 0 else ()

    def defaults(self) -> dict[str, Any]:
        return {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}

    def check_group(self, group: Mapping[str, Any]) -> None:
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
        momentum = float(self.read(group, "momentum"))
        weight_decay = float(self.read(group, "weight_decay"))
        if weight_decay != 0:
            grad.add_(master, alpha=weight_decay)
        direction = grad
        if momentum != 0:
            buffer = state["momentum_buffer"]
            if step == 1:
                buffer.copy_(grad)
            else:
                buffer.mul_(momentum).add_(grad, alpha=1 - float(self.read(group, "dampening")))
            direction = grad.add_(buffer, alpha=momentum) if self.read(group, "nesterov") else buffer
        master.add_(direction, alpha=-lr)

    def update_fused(
        self,
        grad: torch.Tensor,
        weights: Weights,
        state: Mapping[str, torch.Tensor],
        group: Mapping[str, Any],
        scalars: torch.Tensor,
        seed: int = 0,
    ) -> None:
        buffer = state.get("momentum_buffer")
        hyper: dict[str, Any] = dict(
            momentum=float(self.read(group, "momentum")), dampening=float(self.read(group, "dampening")),
            weight_decay=float(self.read(group, "weight_decay")), nesterov=bool(self.read(group, "nesterov")),
            seed=seed,
        )  # fmt: skip
        if buffer is not None and buffer.dtype == torch.uint8:
            from hift_kernels.int8 import sgd_int8_step

            sgd_int8_step(grad, weights, buffer, state["momentum_buffer_scale"], scalars, **hyper)
        else:
            from hift_kernels.sgd import sgd_step

            sgd_step(grad, weights, buffer, scalars, **hyper)
