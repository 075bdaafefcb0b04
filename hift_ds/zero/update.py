"""One update of one unit: master weights and state tile by tile, by an eager rule or by a fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from hift_ds.rules import Rule
from hift_ds.shards import Run
from hift_ds.state.formats import GROUP
from hift_ds.state.ring import Ring, Tile
from hift_ds.state.unit_state import UnitState, part_of
from hift_ds.zero.unit_gradients import LoneGradient
from hift_ds.zero.weights import NewWeights

Tensors = dict[str, torch.Tensor]
# Updates a part of a tile in place: its range of the shard, gradient as reduced, model weights, state on the device.
Compute = Callable[[slice, torch.Tensor, torch.Tensor, Tensors], None]


class Gradient(Protocol):
    """A shard's averaged gradient; a range of it is asked for at a time."""

    dtype: torch.dtype

    def __getitem__(self, span: slice, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Scaling:
    """What unscales and clips a gradient.

    Attributes:
        loss_scale: 1 outside fp16.
        clip: Largest norm; 0 = off.
        norm: Global norm of the unscaled gradient; `None` where the host does not wait for it (fused kernels alone).
        square: The same on the device, scaled and squared: fp64, one element; nan leaves the update out.
    """

    loss_scale: float
    clip: float
    norm: float | None
    square: torch.Tensor

    @property
    def divisor(self) -> float:
        """What eager rules divide by."""
        assert self.norm is not None
        excess = (self.norm + 1e-6) / self.clip if self.clip > 0 else 1.0
        return self.loss_scale * max(1.0, excess)


class UnitUpdate:
    """Updates units, one at a time.

    Args:
        rule: The update rule.
        param_groups: The hyper-parameter holder's; their "lr" is not read.
        device: Where updates run.
        all_reduce: Sums a tensor over the ranks that share a block's state.
        kernel: `torch` (eager) or `triton` (one fused pass, no fp32 copy of the gradient).
        ring: What streaming states stream through.
        seed: Draws stochastic rounding, together with block, step and rank.
    """

    def __init__(
        self,
        rule: Rule,
        param_groups: list[dict[str, Any]],
        device: torch.device,
        all_reduce: Callable[[torch.Tensor], torch.Tensor],
        kernel: str,
        ring: Ring | None = None,
        seed: int = 0,
    ) -> None:
        self.rule, self.param_groups, self.device = rule, param_groups, device
        self.all_reduce, self.kernel, self.ring, self.seed = all_reduce, kernel, ring, seed

    def run(
        self, state: UnitState, grad: Gradient, new: NewWeights, scaling: Scaling, rates: list[float], unit: int
    ) -> None:
        """Updates masters and state of a unit in place. Collective for a rule that is not elementwise.

        Args:
            state: The unit's; its `step` is counted up. It is `torn` until the caller ends the step.
            grad: The averaged gradient shard, scaled and not clipped: 1-D, shard length.
            new: Takes the new model weights.
            rates: Learning rate in force, one per param group.
            unit: Tells units apart where rounding is random.
        """
        with state.counted() as fresh:
            if not self.rule.elementwise:
                for index, run in enumerate(state.shard.runs):
                    self._whole_run(state, index, run, grad, new, scaling, rates[run.group], unit)
                return
            fused = self.kernel == "triton"
            of_run, range_of = (self._fused, grad.__getitem__) if fused else (self._eager, partial(spent, grad))
            computes = [of_run(state, run, scaling, rates[run.group], unit) for run in state.shard.runs]
            reads = state.weights_count
            for tile, tensors in self._visit(state, state.tiles, fresh=fresh):
                for span in state.shard.parts(tile.span, GROUP):
                    part = part_of(tensors, span.start - tile.span.start, span.stop - tile.span.start)
                    weights = new.begin(span, reads)
                    computes[tile.run](span, range_of(span), weights, part)
                    new.end(span, weights)

    def _visit(
        self, state: UnitState, tiles: list[Tile], write: bool = True, fresh: bool = False
    ) -> Iterator[tuple[Tile, Tensors]]:
        if state.streams and self.ring is not None:
            return self.ring.visit(tiles, write, fresh)
        return ((tile, tile.home) for tile in tiles)

    def _eager(self, state: UnitState, run: Run, scaling: Scaling, lr: float, unit: int) -> Compute:
        def compute(span: slice, grad: torch.Tensor, weights: torch.Tensor, tensors: Tensors) -> None:
            master, gradient = tensors.get("master"), unscaled(grad, scaling)
            state.torn = True
            self.rule.update(
                weights if master is None else master, gradient, tensors, self.param_groups[run.group], lr=lr,
                step=state.step,
            )  # fmt: skip
            if master is not None:
                weights.copy_(master)

        return compute

    def _fused(self, state: UnitState, run: Run, scaling: Scaling, lr: float, unit: int) -> Compute:
        from hift_kernels.rounding import mixed_seed

        group = self.param_groups[run.group]
        scalars = self._scalars(state, group, scaling, lr)

        def compute(span: slice, grad: torch.Tensor, weights: torch.Tensor, tensors: Tensors) -> None:
            seed = mixed_seed(self.seed, unit, state.step, state.shard.rank, span.start)
            state.torn = True
            self.rule.update_fused(grad, _form(weights, tensors.get("master")), tensors, group, scalars, seed)

        return compute

    def _scalars(self, state: UnitState, group: dict[str, Any], scaling: Scaling, lr: float) -> torch.Tensor:
        """What the kernels need of step, rate, norm and clipping, on the device; no wait."""
        from hift_kernels.grad_norm import STEP, prepare
        from hift_kernels.launching import NUM_SCALARS

        scalars = torch.zeros(NUM_SCALARS, device=self.device)
        scalars[STEP].fill_(state.step - 1)
        scale = torch.full((1,), scaling.loss_scale, dtype=torch.float64, device=self.device)
        prepare(scaling.square, scale, scalars, lr=lr, max_norm=scaling.clip, **self.rule.prepared(group))
        return scalars

    def _whole_run(
        self, state: UnitState, index: int, run: Run, grad: Gradient, new: NewWeights, scaling: Scaling,
        lr: float, unit: int,
    ) -> None:  # fmt: skip
        """A rule that looks at whole parameters: it goes over the tiles of a run more than once."""
        tiles = [tile for tile in state.tiles if tile.run == index]
        group, whole = self.param_groups[run.group], slice(run.start, run.stop)
        common: dict[str, Any] = dict(
            lr=lr, step=state.step, segments=run.segments, extra=state.extra, all_reduce=self.all_reduce
        )

        reads = state.weights_count

        def masters(write: bool) -> Iterator[tuple[int, torch.Tensor]]:
            for tile, tensors in self._visit(state, tiles, write):
                master, weights = tensors.get("master"), new.begin(tile.span, reads)
                yield tile.span.start - run.start, weights if master is None else master
                if write:
                    new.end(tile.span, weights if master is None else weights.copy_(master))

        def forms(write: bool) -> Iterator[tuple[int, Any]]:
            for tile, tensors in self._visit(state, tiles, write):
                weights = new.begin(tile.span, reads)
                yield tile.span.start - run.start, _form(weights, tensors.get("master"))
                if write:
                    new.end(tile.span, weights)

        if self.kernel == "triton":
            from hift_kernels.rounding import mixed_seed

            seed = mixed_seed(self.seed, unit, state.step, state.shard.rank, index)
            scalars = self._scalars(state, group, scaling, lr)
            state.torn = True
            self.rule.update_run_fused(forms, grad[whole], group, scalars, seed=seed, **common)
        else:
            gradient = unscaled(spent(grad, whole), scaling)
            state.torn = True
            self.rule.update_run(masters, gradient, group, **common)


def spent(grad: Gradient, span: slice) -> torch.Tensor:
    """A range of a gradient, which may be overwritten.

    `.grad` may share its memory with what backward has yet to use: that of a view's gradient is the gradient itself.
    """
    part = grad[span]
    return part.clone() if isinstance(grad, LoneGradient) and part.dtype == torch.float32 else part


def unscaled(grad: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """The gradient in fp32 as eager rules take it; one that is fp32 already is changed in place."""
    gradient = grad.float()
    return gradient if scaling.divisor == 1.0 else gradient.mul_(1.0 / scaling.divisor)


def _form(weights: torch.Tensor, master: torch.Tensor | None) -> Any:
    from hift_kernels.launching import Weights

    if master is None:
        return Weights("plain" if weights.dtype == torch.float32 else "none", weights)
    return Weights("split16" if master.dtype == torch.int16 else "fp32", weights, master)
