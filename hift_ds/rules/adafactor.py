"""Adafactor on slices of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hift_ds.rules.base import (
    AllReduce,
    Group,
    Rule,
    Tensors,
    Visit,
    VisitWeights,
    check_number,
    check_pair,
    refuse_flags,
)
from hift_ds.shards import Segment, pieces


class Adafactor(Rule):
    """Adafactor: a factored second moment, relative step size and update clipping.

    State, whole on every rank, in torch's shapes (so that it does not depend on the number of ranks): `row_var` and
    `col_var`, the means of the squared gradient over the last and the last but one dimension: for a matrix of R rows
    and C columns 4 (R + C) bytes, that is 4/R + 4/C bytes a parameter; for a parameter of fewer than two dimensions
    `variance`, 4 bytes a parameter. One temporary tensor as long as the largest slice. Two all-reduces an update,
    the first as long as the state.

    Source: arXiv 1804.04235; maths: torch.optim.Adafactor with foreach=False, but for the order of summation.
    """

    name = "adafactor"
    elementwise = False
    moments = ("fp32",)

    def slots(self, group: Group) -> tuple[str, ...]:
        return ()

    def defaults(self) -> dict[str, Any]:
        return {"lr": 1e-2, "beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0, "weight_decay": 0.0}

    def check_group(self, group: Group) -> None:
        eps1, eps2 = check_pair("eps", self.read(group, "eps"))
        check_number("lr", self.read(group, "lr"))
        check_number("beta2_decay", self.read(group, "beta2_decay"), low=-math.inf, high=0.0)
        if eps1 is not None:
            check_number("eps[0]", eps1)
        check_number("eps[1]", eps2)
        check_number("d", self.read(group, "d"), low=1.0)
        check_number("weight_decay", self.read(group, "weight_decay"))
        refuse_flags(group, "maximize", "differentiable")

    def init_extra(self, segments: Sequence[Segment], group: Group) -> dict[str, torch.Tensor]:
        return {
            f"{segment.fqn}.{slot}": torch.zeros(shape, dtype=torch.float32)
            for segment in segments
            for slot, shape in _moment_shapes(segment.shape).items()
        }

    def update_run(
        self, visit: Visit, grad: Tensor, group: Group, *, lr: float, step: int, segments: Sequence[Segment],
        extra: dict[str, Tensor], all_reduce: AllReduce,
    ) -> None:  # fmt: skip
        """As `Rule.update_run`; tiles are visited twice: read, then changed."""
        segments = [segment for segment in segments if segment.shape.numel() > 0]
        if not segments:
            return
        eps1, eps2 = self.read(group, "eps")
        eps1 = torch.finfo(torch.float32).eps if eps1 is None else float(eps1)
        threshold = self.number(group, "d")
        weight_decay = self.number(group, "weight_decay")

        # Before the decay: the step is relative to the parameter as it was.
        squares = grad.new_zeros(len(segments), dtype=torch.float64)
        for start, master in visit(False):
            for index, first, last in pieces(segments, start, master.numel()):
                part = master[first - start : last - start]
                squares[index] += torch.linalg.vector_norm(part, dtype=torch.float64).square_()
        param_squares = squares.float()
        weight = float(step) ** self.number(group, "beta2_decay")
        moments = _update_moments(grad, param_squares, segments, extra, weight, all_reduce)
        for segment in segments:
            _precondition(_valid(grad, segment), segment, moments, eps1)
        update_squares = torch.stack([_sum_of_squares(_valid(grad, segment)) for segment in segments])
        all_reduce(update_squares)

        rho = min(lr, 1 / step**0.5)
        factors = []
        both = torch.stack([param_squares, update_squares]).tolist()  # the only wait for the device
        for segment, param_square, update_square in zip(segments, *both, strict=True):
            root_numel = segment.shape.numel() ** 0.5
            alpha = max(float(eps2), param_square**0.5 / root_numel) * rho
            factors.append(-alpha / max(1.0, update_square**0.5 / (root_numel * threshold)))
        for start, master in visit(True):
            if weight_decay != 0:
                master.mul_(1 - lr * weight_decay)
            for index, first, last in pieces(segments, start, master.numel()):
                master[first - start : last - start].add_(grad[first:last], alpha=factors[index])

    def update_run_fused(
        self, visit: VisitWeights, grad: Tensor, group: Group, scalars: Tensor, *, seed: int, **options: Any
    ) -> None:
        from hift_ds.rules.adafactor_fused import update_run

        update_run(self, visit, grad, group, scalars, seed=seed, **options)


@dataclass(frozen=True)
class _Box:
    """Elements of a slice that form a rectangle in the parameter seen as (batches, rows, columns)."""

    offset: int  # in the slice
    batch: int
    row: int
    column: int
    shape: tuple[int, int, int]

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + math.prod(self.shape)].view(self.shape)

    def of_rows(self, row_var: Tensor) -> Tensor:
        return row_var[self.batch : self.batch + self.shape[0], self.row : self.row + self.shape[1], :]

    def of_columns(self, col_var: Tensor) -> Tensor:
        return col_var[self.batch : self.batch + self.shape[0], :, self.column : self.column + self.shape[2]]


def _boxes(segment: Segment) -> Iterator[_Box]:
    """Cut a slice of a parameter of two or more dimensions into at most 7 boxes.

    A slice starts and ends anywhere: first cut at the bounds of batches, then a piece of one batch at those of rows.
    """
    num_rows, num_columns = segment.shape[-2:]
    for start, stop in _cut(segment.start, segment.start + segment.numel, num_rows * num_columns):
        batch, in_batch = divmod(start, num_rows * num_columns)
        if stop - start >= num_rows * num_columns:
            num_batches = (stop - start) // (num_rows * num_columns)
            yield _Box(start - segment.start, batch, 0, 0, (num_batches, num_rows, num_columns))
            continue
        for row_start, row_stop in _cut(in_batch, in_batch + stop - start, num_columns):
            row, column = divmod(row_start, num_columns)
            numel = row_stop - row_start
            shape = (1, numel // num_columns, num_columns) if numel >= num_columns else (1, 1, numel)
            yield _Box(start - segment.start + row_start - in_batch, batch, row, column, shape)


def _cut(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut [start, stop) at the first and last multiple of `size` in it: at most a piece, whole sizes, a piece."""
    first = min(stop, -(-start // size) * size)
    last = max(first, stop // size * size)
    for begin, end in ((start, first), (first, last), (last, stop)):
        if begin < end:
            yield begin, end


def _moment_shapes(shape: torch.Size) -> dict[str, torch.Size]:
    if len(shape) < 2:
        return {"variance": shape}
    return {"row_var": torch.Size((*shape[:-1], 1)), "col_var": torch.Size((*shape[:-2], 1, shape[-1]))}


def _valid(flat: Tensor, segment: Segment) -> Tensor:
    return flat[segment.offset : segment.offset + segment.numel]


def _sum_of_squares(flat: Tensor) -> Tensor:
    return torch.linalg.vector_norm(flat).square_()  # no temporary as long as `flat`


def _matrices(moments: Tensors, segment: Segment) -> tuple[Tensor, torch.Tensor]:
    """row_var (batches, rows, 1) and col_var (batches, 1, columns) of a factored parameter, as views."""
    num_rows, num_columns = segment.shape[-2:]
    row_var = moments[f"{segment.fqn}.row_var"].view(-1, num_rows, 1)
    return row_var, moments[f"{segment.fqn}.col_var"].view(-1, 1, num_columns)


def _update_moments(
    grad: Tensor, param_squares: Tensor, segments: Sequence[Segment], extra: dict[str, Tensor], weight: float,
    all_reduce: AllReduce,
) -> dict[str, Tensor]:  # fmt: skip
    """Move the second moments in `extra` towards this gradient's. One all-reduce, which also sums `param_squares`.

    Returns:
        The new moments as flat tensors on the gradient's device, with `extra`'s keys.
    """
    keys = [f"{segment.fqn}.{slot}" for segment in segments for slot in _moment_shapes(segment.shape)]
    sizes = [extra[key].numel() for key in keys]
    packed = grad.new_zeros(sum(sizes) + len(segments))
    sums, packed_squares = packed.split((sum(sizes), len(segments)))
    packed_squares.copy_(param_squares)
    views = dict(zip(keys, sums.split(sizes), strict=True))
    for segment in segments:
        _add_squares(_valid(grad, segment), segment, views)
    all_reduce(packed)
    param_squares.copy_(packed_squares)
    for segment in segments:
        if len(segment.shape) >= 2:
            views[f"{segment.fqn}.row_var"].div_(segment.shape[-1])
            views[f"{segment.fqn}.col_var"].div_(segment.shape[-2])

    # One copy each way where `extra` lies on the host, not two per parameter.
    stored = torch.cat([extra[key].flatten() for key in keys])
    moments = stored.to(grad.device).lerp_(sums, weight)
    for key, new in zip(keys, moments.to(stored.device).split(sizes), strict=True):
        extra[key].copy_(new.view(extra[key].shape))
    return dict(zip(keys, moments.split(sizes), strict=True))


def _add_squares(grad: Tensor, segment: Segment, sums: Tensors) -> None:
    if len(segment.shape) < 2:
        sums[f"{segment.fqn}.variance"][segment.start : segment.start + segment.numel].addcmul_(grad, grad)
        return
    row_sums, col_sums = _matrices(sums, segment)
    for box in _boxes(segment):
        part = box.of(grad)
        box.of_rows(row_sums).add_(torch.linalg.vector_norm(part, dim=2, keepdim=True).square_())
        box.of_columns(col_sums).add_(torch.linalg.vector_norm(part, dim=1, keepdim=True).square_())


def _precondition(grad: Tensor, segment: Segment, moments: Tensors, eps1: float) -> None:
    """Turn a slice's gradient into its update, before clipping, in place."""
    if len(segment.shape) < 2:
        variance = moments[f"{segment.fqn}.variance"][segment.start : segment.start + segment.numel]
        grad.mul_(variance.clamp(min=eps1 * eps1).rsqrt_())
        return
    row_var, col_var = _matrices(moments, segment)
    row_mean = row_var.mean(dim=1, keepdim=True).clamp_(min=eps1)
    for box in _boxes(segment):
        estimate = box.of_rows(row_var) * box.of_columns(col_var)
        estimate.div_(row_mean[box.batch : box.batch + box.shape[0]])
        # eps1 is squared because the root comes after.
        box.of(grad).mul_(estimate.clamp_(min=eps1 * eps1).rsqrt_())
