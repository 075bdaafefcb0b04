"""The update of a block on the host: `offload_optimizer.device: cpu`.

The gradient comes to the host and the new model weights go back, 2 + 2 bytes per parameter in bf16, in place of the 24
that fp32 masters and moments need to visit the device: the better choice where the bus is slow and the host has cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from hift_ds.rules import Rule
from hift_ds.rules.adam import Adam
from hift_ds.state.ring import Tile
from hift_ds.state.unit_state import UnitState
from hift_ds.zero.update import Gradient, Scaling, unscaled
from hift_ds.zero.weights import NewWeights


class HostUpdate:
    """Takes `UnitUpdate`'s place for states on the host: DeepSpeedCPUAdam for Adam and AdamW, else the eager rule.

    The host waits for the gradient and works while the device rests; copies of one tile overlap with the update of
    another, through five buffers of a tile in fp32 beside the states.

    Args:
        rule: The update rule.
        param_groups: The hyper-parameter holder's.
        device: Where gradients and model weights are.
        all_reduce: Sums a device tensor over the ranks that share a block's state.
        states: The blocks'.

    Raises:
        RuntimeError: DeepSpeed's C++ op cannot be built.
    """

    def __init__(
        self,
        rule: Rule,
        param_groups: list[dict[str, Any]],
        device: torch.device,
        all_reduce: Callable[[torch.Tensor], torch.Tensor],
        states: list[UnitState],
    ) -> None:
        self.rule, self.param_groups, self.device, self.all_reduce = rule, param_groups, device, all_reduce
        self._adam = _adam(rule) if isinstance(rule, Adam) else None
        self._staging = _Staging(states, device) if rule.elementwise else None

    def run(
        self, state: UnitState, grad: Gradient, new: NewWeights, scaling: Scaling, rates: list[float], unit: int
    ) -> None:
        """As `UnitUpdate.run`."""
        with state.counted():
            self._run(state, grad, new, scaling, rates)

    def _run(
        self, state: UnitState, grad: Gradient, new: NewWeights, scaling: Scaling, rates: list[float]
    ) -> None:
        if self._staging is None:
            assert state.master is not None  # as of every state on the host
            self._whole_runs(state, state.master, grad, scaling, rates)
            new.end(slice(0, state.shard.numel), state.master)
            return
        for tile, gradient in self._staging.visit(state.tiles, grad, new):
            run = state.shard.runs[tile.run]
            gradient = unscaled(gradient, scaling)
            state.torn = True
            group, lr = self.param_groups[run.group], rates[run.group]
            if self._adam is not None:
                self._step_adam(self._adam, tile.home, gradient, group, lr, state.step)
            else:
                self.rule.update(tile.home["master"], gradient, tile.home, group, lr=lr, step=state.step)

    def _step_adam(
        self, adam: DeepSpeedCPUAdam, tensors: dict[str, torch.Tensor], gradient: torch.Tensor, group: dict[str, Any],
        lr: float, step: int,
    ) -> None:  # fmt: skip
        param = torch.nn.Parameter(tensors["master"], requires_grad=False)
        param.grad = gradient
        hyper = {key: self.rule.read(group, key) for key in ("betas", "eps", "weight_decay", "bias_correction")}
        adam.param_groups = [{"params": [param], "lr": lr, "amsgrad": False, **hyper}]
        adam.state[param] = {
            "step": step - 1, "exp_avg": tensors["exp_avg"], "exp_avg_sq": tensors["exp_avg_sq"],
        }  # fmt: skip
        adam.step()
        adam.state.clear()

    def _whole_runs(
        self, state: UnitState, masters: torch.Tensor, grad: Gradient, scaling: Scaling, rates: list[float]
    ) -> None:
        def all_reduce(tensor: torch.Tensor) -> None:
            tensor.copy_(self.all_reduce(tensor.to(self.device)))

        for run in state.shard.runs:
            master = masters[run.start : run.stop]

            def visit(write: bool, master: torch.Tensor = master) -> Iterator[tuple[int, torch.Tensor]]:
                yield 0, master

            gradient = unscaled(grad[run.start : run.stop].to("cpu", copy=True), scaling)
            state.torn = True
            self.rule.update_run(
                visit, gradient, self.param_groups[run.group], lr=rates[run.group], step=state.step,
                segments=run.segments, extra=state.extra, all_reduce=all_reduce,
            )  # fmt: skip


class _Staging:
    """Two buffers each in the states' host memory, for gradients on their way in and new weights on their way out.

    One more holds a gradient in fp32: a new tensor of 32 MiB a tile would cost more than the update (page faults).

    Args:
        states: Every state that is updated on the host; their longest tile in fp32 is a buffer.
        device: Where gradients and model weights are.
    """

    def __init__(self, states: list[UnitState], device: torch.device) -> None:
        self._device = device
        longest = max(tile.span.stop - tile.span.start for state in states for tile in state.tiles)
        names = ("in0", "in1", "out0", "out1")
        memory = states[0].storage.memory
        assert memory is not None  # their home is the host
        arena = memory.arena(dict.fromkeys(names, (longest, torch.float32)))
        self._in, self._out = [arena[name] for name in names[:2]], [arena[name] for name in names[2:]]
        self._fp32 = torch.empty(longest)
        self._fetched: list[Any] = [None, None]
        self._sent: list[Any] = [None, None]

    def visit(
        self, tiles: list[Tile], grad: Gradient, new: NewWeights
    ) -> Iterator[tuple[Tile, torch.Tensor]]:
        """Each tile with its gradient in fp32 on the host, to be used up; meanwhile the next one's comes.

        When the next tile is asked for, this one's masters start their way to the model as its new weights.
        """
        self._fetch(0, tiles[0], grad)
        for index, tile in enumerate(tiles):
            if index + 1 < len(tiles):
                self._fetch(index + 1, tiles[index + 1], grad)
            _wait(self._fetched[index % 2])
            gradient = _part(self._in[index % 2], tile, grad.dtype)
            if grad.dtype != torch.float32:
                gradient = _part(self._fp32, tile, torch.float32).copy_(gradient)
            yield tile, gradient
            _wait(self._sent[index % 2])  # of two tiles ago, or of an earlier block
            new.end(tile.span, _part(self._out[index % 2], tile, new.dtype).copy_(tile.home["master"]))
            self._sent[index % 2] = self._event()

    def _fetch(self, index: int, tile: Tile, grad: Gradient) -> None:
        _part(self._in[index % 2], tile, grad.dtype).copy_(grad[tile.span], non_blocking=True)
        self._fetched[index % 2] = self._event()

    def _event(self) -> Any:
        if self._device.type != "cuda":
            return None
        return torch.cuda.current_stream(self._device).record_event()


def _part(buffer: torch.Tensor, tile: Tile, dtype: torch.dtype) -> torch.Tensor:
    return buffer.view(dtype)[: tile.span.stop - tile.span.start]


def _wait(event: Any) -> None:
    if event is not None:
        event.synchronize()


def _adam(rule: Adam) -> DeepSpeedCPUAdam:
    try:
        return DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))], adamw_mode=rule.decoupled)
    except RuntimeError as error:
        raise RuntimeError(
            "zero_optimization.offload_optimizer.device='cpu': DeepSpeedCPUAdam cannot be built here "
            f"({error.__cause__ or error}); install a C++ compiler and ninja, or remove offload_optimizer"
        ) from error
