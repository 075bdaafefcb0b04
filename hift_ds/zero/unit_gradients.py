"""Gradients for updates in backward: each unit's goes away as soon as it is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hift_ds.config.resolve import ResolvedConfig
from hift_ds.shards import UnitShard, pieces
from hift_ds.state.host_memory import HostMemory
from hift_ds.zero.gradients import GradientReducer, Window


class UnitReducer(GradientReducer):
    """As GradientReducer, but in the window's last backward a unit is given to its update when its gradient is whole.

    It is whole when all of its parameters that this backward reaches have theirs and, where there are several ranks,
    the units before it are gone: every rank issues the same collectives in the same order. What no backward has
    completed is given by `give_rest`. With `hift.accumulate` "host" a unit's gradient of an earlier micro step goes to
    the host in the same way.

    Args:
        config: The run's.
        group: The data-parallel process group.
        give: Updates a unit; meanwhile `take` has its gradient.
        host: Keeps earlier micro steps' gradients; `None` = they stay on the device.

    Attributes:
        at_boundary: Whether the present backward is the window's last.
        will_come: Whether the present backward computes the gradient of a parameter.
    """

    def __init__(
        self, config: ResolvedConfig, group: object, give: Callable[[UnitShard], Any], host: HostGradients | None = None
    ) -> None:
        super().__init__(config, group)
        self._give, self._host = give, host
        self.at_boundary: Callable[[], bool] = lambda: True
        self.will_come: Callable[[torch.nn.Parameter], bool] = will_come
        self._begun = False  # something has come in the present backward

    def open(self, shards: Iterable[UnitShard]) -> None:
        """As `GradientReducer.open`."""
        shards = list(shards)
        super().open(shards)
        self._begun = False
        if self._host is not None:
            self._host.open(shards)

    def on_gradient(self, param: torch.nn.Parameter) -> None:
        """As `GradientReducer.on_gradient`; may update units.

        Raises:
            RuntimeError: A gradient after its unit has been updated, or sent on.
        """
        last = self.at_boundary()
        known = self._window_of.get(param)
        if known is not None and known.gone:
            self._refuse_second(known, param)
        if not last and self._host is None:
            super().on_gradient(param)
            return
        window = self._touched(param)
        if not self._begun:
            self._begun = True
            for one in self._windows.values():
                one.missing = set(filter(self.will_come, one.shard.params))
        if self.at_once and self.config.world > 1 and param not in window.missing:
            self._refuse_second(window, param)
        window.missing.discard(param)
        if self.config.world == 1:
            if not last or window.result is not None or self._host is not None:  # else the update reads `.grad` itself
                self._add_alone(window, param)
        elif not self.at_once:
            self._keep(window, param)
        self._send_whole(last)

    def finish_backward(self, boundary: bool) -> None:
        """After each backward but a window's last: reduces what is left. Collective."""
        if boundary:
            self.finished = True  # `give_rest` reduces
        elif self._host is None:
            super().finish_backward(boundary)
        else:
            self.finished = True
            for window in self._windows.values():
                if not window.gone:
                    self._complete(window, last=False)
            self._begin_backward()

    def give_rest(self) -> None:
        """At the window's end: the units that the backward has not completed. Collective."""
        for window in self._windows.values():
            if not window.gone:
                self._complete(window, last=True)
        self._begin_backward()
        if self._host is not None:
            self._host.clear()

    def take(self, shard: UnitShard) -> tuple[torch.Tensor | LoneGradient, set[torch.nn.Parameter]]:  # type: ignore[override]
        """As `GradientReducer.take`; a lone rank's gradient may still lie in `.grad`."""
        window, kept = self._windows[id(shard)], self._host is not None and self._host.has(shard)
        if window.result is None and self.config.world == 1 and not kept:
            touched, window.touched = window.touched, set()
            return LoneGradient(shard, self.config.accumulation_dtype), touched
        self.finished = True
        result, touched = super().take(shard)
        if self._host is not None:
            self._host.add_to(shard, result)
        return result, touched

    def discard(self) -> None:
        """As `GradientReducer.discard`."""
        super().discard()
        self._begin_backward()
        if self._host is not None:
            self._host.clear()

    def num_reached(self, but: UnitShard | None) -> int:
        """How many parameters have or get a gradient in the window, `but` those of one shard and what `take` has had.

        What is always active may be whole before anything of the block is.
        """
        windows = [window for window in self._windows.values() if window.shard is not but and not window.gone]
        return sum(len(window.touched | window.missing if self._begun else window.touched) for window in windows)

    def _refuse_second(self, window: Window, param: torch.nn.Parameter) -> None:
        if window.gone:
            raise RuntimeError(
                f"{window.shard.fqns[window.shard.position[param]]}: a second gradient, and the update of this window "
                'is made: with hift.update \'backward\' its last micro step has one backward (add losses up, or use '
                '"update": "step") and engine.step() comes next; reentrant checkpointing of a shared parameter does '
                "this, too (use_reentrant=False)"
            )
        super()._refuse_second(window, param)

    def _begin_backward(self) -> None:
        self._begun = False
        for window in self._windows.values():
            window.missing, window.launched, window.gone = set(window.shard.params), 0, False

    def _send_whole(self, last: bool) -> None:
        several = self.config.world > 1
        for window in self._windows.values():
            if window.gone:
                continue
            whole = self._launch_whole(window) and not window.missing
            if whole and (window.touched or several):
                self._complete(window, last)
            elif not whole and several:
                return

    def _complete(self, window: Window, last: bool) -> None:
        self._reduce(window)
        window.gone = True
        if last:
            self._give(window.shard)
        elif self._host is not None and window.result is not None:
            result, window.result = window.result, None
            self._host.add(window.shard, result)
        for param in window.shard.params:
            param.grad = None
        window.whole.clear()


def host_gradient_numel(config: ResolvedConfig, turns: Iterable[Iterable[UnitShard]]) -> int:
    """Elements of gradients that wait on the host (`hift.accumulate`), of all that trains in the largest turn."""
    if config.hift.accumulate == "device" or config.micro_steps == 1:
        return 0
    return max(sum(shard.numel for shard in shards) for shards in turns)


class HostGradients:
    """What earlier micro steps' gradients of one block, and of what is always active, add up to: on the host.

    Args:
        memory: Where.
        numel: Elements of the largest block's shards, those of what is always active included.
        dtype: Of the sum.

    Attributes:
        buffer: All of it, 1-D.
    """

    def __init__(self, memory: HostMemory, numel: int, dtype: torch.dtype) -> None:
        self.buffer = memory.arena({"gradients": (numel, dtype)})["gradients"]
        self._places: dict[int, torch.Tensor] = {}
        self._filled: set[int] = set()

    def open(self, shards: Iterable[UnitShard]) -> None:
        """Another block's turn."""
        self._places, start = {}, 0
        for shard in shards:
            self._places[id(shard)] = self.buffer[start : start + shard.numel]
            start += shard.numel
        self._filled.clear()

    def has(self, shard: UnitShard) -> bool:
        """Whether there is anything of a unit."""
        return id(shard) in self._filled

    def add(self, shard: UnitShard, grad: torch.Tensor) -> None:
        """Adds a gradient shard (1-D, on the device), which is used up."""
        self.add_to(shard, grad)
        self._places[id(shard)].copy_(grad, non_blocking=True)
        self._filled.add(id(shard))

    def add_to(self, shard: UnitShard, grad: torch.Tensor) -> None:
        """Adds what there is to a gradient shard."""
        if self.has(shard):
            # A copy on a CPU, too: planned bytes are those of a card. In order with the copies back: one stream.
            grad.add_(self._places[id(shard)].to(grad.device, non_blocking=True, copy=True))

    def clear(self) -> None:
        """Forgets everything."""
        self._filled.clear()


class LoneGradient:
    """A lone rank's gradient of a unit, still in `.grad` of its parameters; a range of it is made when it is asked for.

    Where one parameter fills a range it is that `.grad` itself. A parameter without a gradient, and padding, are zeros.

    Args:
        shard: The unit's.
        dtype: Of what is made.
    """

    def __init__(self, shard: UnitShard, dtype: torch.dtype) -> None:
        self._shard, self.dtype = shard, dtype

    def __getitem__(self, span: slice) -> torch.Tensor:
        """1-D, of the span's length."""
        out = None
        for index, first, last in pieces(self._shard.segments, span.start, span.stop - span.start):
            grad, start = self._shard.params[index].grad, self._shard.segments[index].offset
            if grad is None:
                continue
            part = grad.reshape(-1)[first - start : last - start]
            if last - first == span.stop - span.start and part.dtype == self.dtype:
                return part
            out = self._zeros(span) if out is None else out
            out[first - span.start : last - span.start].copy_(part)
        return self._zeros(span) if out is None else out

    @property
    def parts(self) -> list[torch.Tensor]:
        """What there is of it, 1-D; at least one tensor."""
        grads = [param.grad.reshape(-1) for param in self._shard.params if param.grad is not None]
        return grads or [self._zeros(slice(0, 0))]

    def _zeros(self, span: slice) -> torch.Tensor:
        return torch.zeros(span.stop - span.start, dtype=self.dtype, device=self._shard.params[0].device)


def will_come(param: torch.nn.Parameter) -> bool:
    """Inside a backward: whether it computes the gradient of a leaf (torch's multi-grad hooks ask so, too)."""
    if not param.requires_grad:  # switched off by the user, of which a warning says that it does not last
        return False
    return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(param).node)
