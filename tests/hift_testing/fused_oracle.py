"""Numpy oracles of the fused kernels: each fp32 operation written out, in the kernel's order, rounded once.

numpy's fp32 square root and division are correctly rounded (torch's CPU square root is not in 0.6 % of cases), so a
kernel must give these bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

F = np.float32


def scalars(
    square: float,
    divisor: float,
    step: float,
    *,
    lr: float,
    beta1: float = 0.0,
    beta2: float = 0.0,
    weight_decay: float = 0.0,
    max_norm: float = 0.0,
    bias_correction: bool = False,
) -> dict[str, float]:
    """What `grad_norm.prepare` must leave, by Python's fp64 arithmetic, before the rounding to fp32."""
    found_inf = not np.isfinite(square)
    norm = float(np.sqrt(square)) / divisor
    if max_norm > 0:
        excess = (norm + 1e-6) / max_norm
        divisor *= excess if excess > 1 else 1.0
    step = step if found_inf else step + 1
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    return {
        "scale": 1 / divisor,
        "found_inf": float(found_inf),
        "step_size": lr / correction1 if correction1 else float("inf"),
        "inv_sqrt_bc2": 1 / correction2**0.5 if correction2 else float("inf"),
        "decay": 1 - lr * weight_decay,
        "rate": lr,
        "norm": norm,
        "step": step,
    }


def adamw(p, g, state, s, *, beta1, beta2, eps, weight_decay, decoupled=True) -> None:
    """fp32 arrays, in place; `s` is the vector of scalars."""
    m, v = state["exp_avg"], state["exp_avg_sq"]
    g = g * s[0]
    if decoupled:
        p *= s[4]
    else:
        g = g + F(weight_decay) * p
    m += F(1 - beta1) * (g - m)
    v += F(1 - beta2) * (g * g - v)
    p -= s[2] * (m / (np.sqrt(v) * s[3] + F(eps)))


def sgd(p, g, state, s, *, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False) -> None:
    direction = g * s[0] + F(weight_decay) * p
    if momentum:
        buffer = state["momentum_buffer"]
        buffer[:] = direction if s[7] == 1 else buffer * F(momentum) + F(1 - dampening) * direction
        direction = direction + F(momentum) * buffer if nesterov else buffer
    p -= s[5] * direction


def lion(p, g, state, s, *, beta1, beta2) -> None:
    m = state["exp_avg"]
    g = g * s[0]
    direction = m * F(beta1) + F(1 - beta1) * g
    p[:] = p * s[4] - s[5] * np.sign(direction)
    m[:] = m * F(beta2) + F(1 - beta2) * g


def adagrad(p, g, state, s, *, eps, weight_decay=0.0, lr_decay=0.0) -> None:
    rate = s[5] / (F(1) + (s[7] - F(1)) * F(lr_decay))
    g = g * s[0] + F(weight_decay) * p
    state["accumulator"] += g * g
    p -= rate * (g / (np.sqrt(state["accumulator"]) + F(eps)))


def adafactor(p, g, s, estimate, coefficient, *, eps1) -> None:
    """`estimate`: the second moments, each element's own."""
    p[:] = p * s[4] - coefficient * (g * s[0] / np.sqrt(np.maximum(estimate, F(eps1 * eps1))))


RULES: dict[str, Any] = {"adamw": adamw, "sgd": sgd, "lion": lion, "adagrad": adagrad}
