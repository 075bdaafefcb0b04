"""One update of one block: master weights and state tile by tile, by an eager rule or by a fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from hift_ds.rules import Rule
from hift_ds.shards import Run
from hift_ds.state import BlockState

# Updates one tile in place: gradient as reduced, model weights, master weights (None: the model's are), slots.
Compute = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", dict[str, torch.Tensor]], None]
TILE_NUMEL = 1 << 23  # elements per pass of an elementwise rule: 32 MiB of fp32 for each operand on the device


class BlockUpdate:
    """Updates blocks, one at a time.

    Args:
        rule: The update rule.
        param_groups: The hyper-parameter holder's; their "lr" is not read.
        device: Where updates run.
        all_reduce: Sums a tensor over the ranks that share a block's state.
        kernel: `torch` (eager) or `triton` (one fused pass, no fp32 copy of the gradient).
    """

    def __init__(
        self,
        rule: Rule,
        param_groups: list[dict[str, Any]],
        device: torch.device,
        all_reduce: Callable[[torch.Tensor], torch.Tensor],
        kernel: str,
    ) -> None:
        self.rule, self.param_groups, self.device = rule, param_groups, device
        self.all_reduce = all_reduce
        self._of_run = self._fused if kernel == "triton" else self._eager

    def run(self, state: BlockState, grad: torch.Tensor, divisor: float, rates: list[float]) -> torch.Tensor:
        """Updates masters and state of a block in place. Collective for a rule that is not elementwise.

        Args:
            state: The block's; its `step` is counted up.
            grad: The averaged gradient shard, scaled and not clipped: 1-D, shard length.
            divisor: What unscales and clips it.
            rates: Learning rate in force, one per param group.

        Returns:
            The new model weights of this rank's shard: 1-D, in the model's dtype (fp32 where a block mixes dtypes).
        """
        state.step += 1
        dtypes = {param.dtype for param in state.shard.params}
        dtype = torch.float32 if len(dtypes) > 1 or state.master is None else dtypes.pop()
        weights = torch.empty(state.shard.numel, dtype=dtype, device=self.device)
        if state.master is None:
            state.shard.read_weights(weights)
        for run in state.shard.runs:
            compute = self._of_run(state, run, divisor, rates[run.group])
            for tile in _tiles(run, self.rule.elementwise):
                _update_tile(state, tile, compute, grad[tile], weights[tile])
        return weights

    def _eager(self, state: BlockState, run: Run, divisor: float, lr: float) -> Compute:
        def compute(
            grad: torch.Tensor, weights: torch.Tensor, master: torch.Tensor | None, slots: dict[str, torch.Tensor]
        ) -> None:
            gradient = grad.float()
            if divisor != 1.0:
                gradient.mul_(1.0 / divisor)
            extra = {key: value.to(self.device) for key, value in state.extra.items()}
            self.rule.update(
                weights if master is None else master, gradient, slots, self.param_groups[run.group],
                lr=lr, step=state.step, segments=run.segments, extra=extra, all_reduce=self.all_reduce,
            )  # fmt: skip
            for key, value in state.extra.items():
                value.copy_(extra[key])
            if master is not None:
                weights.copy_(master)

        return compute

    def _fused(self, state: BlockState, run: Run, divisor: float, lr: float) -> Compute:
        from hift_kernels.grad_norm import STEP, prepare
        from hift_kernels.launching import NUM_SCALARS, Weights

        group = self.param_groups[run.group]
        scalars = torch.zeros(NUM_SCALARS, device=self.device)
        scalars[STEP] = state.step - 1
        finite = torch.zeros(1, dtype=torch.float64, device=self.device)  # a step that is not has ended before
        scale = torch.full((1,), divisor, dtype=torch.float64, device=self.device)
        prepare(finite, scale, scalars, lr=lr, **self.rule.prepared(group))

        def compute(
            grad: torch.Tensor, weights: torch.Tensor, master: torch.Tensor | None, slots: dict[str, torch.Tensor]
        ) -> None:
            form = Weights("plain", weights) if master is None else Weights("fp32", weights, master)
            self.rule.update_fused(grad, form, slots, group, scalars)

        return compute


def _update_tile(
    state: BlockState, tile: slice, compute: Compute, grad: torch.Tensor, weights: torch.Tensor
) -> None:
    # A function of its own: what it loads is free before the next tile is loaded.
    slots = {name: state.load(tensor, tile) for name, tensor in state.slots.items()}
    master = None if state.master is None else state.load(state.master, tile)
    compute(grad, weights, master, slots)
    for name, tensor in state.slots.items():
        state.store(tensor, tile, slots[name])
    if master is not None:
        state.store(state.master, tile, master)


def _tiles(run: Run, elementwise: bool) -> Iterator[slice]:
    step = TILE_NUMEL if elementwise else max(run.stop - run.start, 1)
    for start in range(run.start, run.stop, step):
        yield slice(start, min(start + step, run.stop))
