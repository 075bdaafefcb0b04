"""Adafactor by the fused kernels: the maths of `hift_ds.rules.adafactor`, and no wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hift_ds.rules.base import AllReduce, Group, Rule, VisitWeights
from hift_ds.shards import Segment, pieces

if TYPE_CHECKING:
    from hift_kernels.launching import Weights


def update_run(
    rule: Rule, visit: VisitWeights, grad: Tensor, group: Group, scalars: Tensor, *, lr: float, step: int,
    segments: Sequence[Segment], extra: dict[str, Tensor], all_reduce: AllReduce, seed: int,
) -> None:  # fmt: skip
    """One update of a run. Collective: two all-reduces, of the second moments and of two numbers a parameter.

    Args:
        grad: As reduced, of the whole run.
        scalars: From `hift_kernels.grad_norm.prepare`.
        extra: The factored moments, on the host or the device; updated in place, on the current stream.
    """
    from hift_kernels.adafactor import adafactor_step, add_update_square, add_weight_square, coefficients
    from hift_kernels.rounding import mixed_seed

    segments = [segment for segment in segments if segment.shape.numel() > 0]
    if not segments:
        return
    eps1, eps2 = rule.read(group, "eps")
    eps1 = torch.finfo(torch.float32).eps if eps1 is None else float(eps1)
    squares = torch.zeros(2, len(segments), dtype=torch.float64, device=grad.device)
    for start, weights in visit(False):
        for index, first, last in pieces(segments, start, weights.weight.numel()):
            add_weight_square(_part(weights, first - start, last - start), squares[0], index)
    moments = _new_moments(rule, grad, group, scalars, step, segments, extra, all_reduce)
    means = [_row_mean(segment, parts, eps1) for segment, parts in zip(segments, moments, strict=True)]
    for index, segment in enumerate(segments):
        part = grad[segment.offset : segment.offset + segment.numel]
        add_update_square(
            part, segment.shape, segment.start, scalars, moments[index], means[index], squares[1], index, eps1=eps1
        )
    all_reduce(squares)
    coefficient = coefficients(
        squares[0], squares[1], _numels(segments, grad.device), lr, step,
        eps2=float(eps2), threshold=rule.number(group, "d"),
    )  # fmt: skip
    for start, weights in visit(True):
        for index, first, last in pieces(segments, start, weights.weight.numel()):
            segment = segments[index]
            adafactor_step(
                grad[first:last], _part(weights, first - start, last - start), segment.shape,
                segment.start + first - segment.offset, scalars, moments[index], means[index], coefficient, index,
                eps1=eps1, seed=mixed_seed(seed, index),  # the kernel adds the element's place in the parameter
            )  # fmt: skip


def _part(weights: Weights, first: int, last: int) -> Weights:
    master = None if weights.master is None else weights.master[first:last]
    return replace(weights, weight=weights.weight[first:last], master=master)


def _numels(segments: Sequence[Segment], device: torch.device) -> Tensor:
    numels = torch.empty(len(segments), dtype=torch.float64, device=device)
    for index, segment in enumerate(segments):
        numels[index].fill_(segment.shape.numel())  # torch.tensor(..., device=) would wait
    return numels


def _row_mean(segment: Segment, moments: tuple[Tensor, ...], eps1: float) -> Tensor | None:
    if len(segment.shape) < 2:
        return None
    return moments[0].view(-1, segment.shape[-2]).mean(dim=1).clamp_(min=eps1)


def _new_moments(
    rule: Rule, grad: Tensor, group: Group, scalars: Tensor, step: int, segments: Sequence[Segment],
    extra: dict[str, Tensor], all_reduce: AllReduce,
) -> list[tuple[Tensor, ...]]:  # fmt: skip
    """The moments in `extra` moved towards this gradient's, and on the device: (rows, columns) or (variance,) each."""
    from hift_kernels.adafactor import add_squares
    from hift_kernels.grad_norm import FOUND_INF

    names = [("row_var", "col_var") if len(segment.shape) >= 2 else ("variance",) for segment in segments]
    keys = [[f"{s.fqn}.{slot}" for slot in slots] for s, slots in zip(segments, names, strict=True)]
    sizes = [extra[key].numel() for of_segment in keys for key in of_segment]
    packed = torch.zeros(sum(sizes), dtype=torch.float32, device=grad.device)
    views = iter(packed.split(sizes))
    moments = [tuple(next(views) for _ in of_segment) for of_segment in keys]
    for segment, sums in zip(segments, moments, strict=True):
        add_squares(grad[segment.offset : segment.offset + segment.numel], segment.shape, segment.start, scalars, sums)
    all_reduce(packed)
    decay = float(step) ** rule.number(group, "beta2_decay")
    weight = decay * (1.0 - scalars[FOUND_INF])  # 0: an update that is left out leaves the moments
    for segment, of_segment, sums in zip(segments, keys, moments, strict=True):
        counts = (segment.shape[-1], segment.shape[-2]) if len(segment.shape) >= 2 else (1,)
        for key, total, count in zip(of_segment, sums, counts, strict=True):
            stored = extra[key].view(-1).to(grad.device, non_blocking=True)
            total.copy_(torch.lerp(stored, total.div_(max(count, 1)), weight))
            extra[key].view(-1).copy_(total, non_blocking=True)
    return moments
