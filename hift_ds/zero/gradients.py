"""From the whole gradients that backward leaves on parameters to this rank's averaged gradient shard of a unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed import comm as dist

from hift_ds.config.resolve import ResolvedConfig
from hift_ds.shards import UnitShard

MAX_IN_FLIGHT = 2  # buckets being reduced at once: one is filled while the other is on the wire


@dataclass
class Window:
    """What one accumulation window has gathered for one unit so far."""

    shard: UnitShard
    buckets: list[range]
    result: torch.Tensor | None = None  # 1-D, shard length, accumulation dtype
    whole: dict[torch.nn.Parameter, torch.Tensor] = field(default_factory=dict)
    touched: set[torch.nn.Parameter] = field(default_factory=set)
    missing: set[torch.nn.Parameter] = field(default_factory=set)  # of the present backward, not here yet
    launched: int = 0  # buckets of the present backward that are on their way
    gone: bool = False  # `UnitReducer`: the unit's gradient of the present backward is whole, and gone
    reduced_once: bool = False  # an earlier backward of the window is in `result`
    in_flight: list[tuple[Any, torch.Tensor, slice]] = field(default_factory=list)


class GradientReducer:
    """Reduces what trains now; holds nothing else's gradients.

    At stages 2 and 3 a bucket is reduced as soon as its parameters' gradients exist, at stages 0 and 1 at the
    accumulation boundary. A lone rank has nothing to send: each gradient is added to the shard as it arrives, and its
    memory is free again. Buckets go out in one fixed order, and a parameter without a gradient counts as zeros (as in
    DeepSpeed's ZeRO), so that all ranks issue the same collectives whatever part of the model their batch used.

    Args:
        config: The run's; without its `overlap_comm` each bucket is waited for.
        group: The data-parallel process group.
    """

    def __init__(self, config: ResolvedConfig, group: object) -> None:
        self.config, self.group = config, group
        self.max_in_flight = MAX_IN_FLIGHT if config.zero.overlap_comm else 0
        self.at_once = config.stage >= 2
        self.finished = False  # nothing has arrived since the last `finish_backward` of this micro step
        self._windows: dict[int, Window] = {}
        self._window_of: dict[torch.nn.Parameter, Window] = {}

    def open(self, shards: Iterable[UnitShard]) -> None:
        """Begins to take the gradients of `shards`, and only of these; they go out in this order."""
        self._windows, self._window_of = {}, {}
        for shard in shards:
            buckets = shard.buckets(self.config.zero.reduce_bucket_size) if self.config.world > 1 else []
            window = Window(shard, buckets, missing=set(shard.params))
            self._windows[id(shard)] = window
            self._window_of.update(dict.fromkeys(shard.params, window))

    def on_gradient(self, param: torch.nn.Parameter) -> None:
        """The hook of a parameter whose `.grad` has just been accumulated.

        Raises:
            RuntimeError: A gradient after its bucket has been reduced in the same backward.
        """
        window = self._touched(param)
        if self.config.world == 1:
            self._add_alone(window, param)
        elif self.at_once:
            if param not in window.missing:
                self._refuse_second(window, param)
            window.missing.discard(param)
            self._launch_ready()
        else:
            self._keep(window, param)

    def _touched(self, param: torch.nn.Parameter) -> Window:
        window = self._window_of.get(param)
        if window is None:
            raise RuntimeError("a gradient arrived for a parameter whose block is not active; was requires_grad set?")
        self.finished = False
        window.touched.add(param)
        return window

    def _refuse_second(self, window: Window, param: torch.nn.Parameter) -> None:
        fqn = window.shard.fqns[window.shard.position[param]]
        raise RuntimeError(
            f"{fqn}: a second gradient in one backward, after the first was reduced: reentrant checkpointing "
            "of a shared parameter does this (call the checkpoint with use_reentrant=False), and so does a "
            "backward after one that ended with an error (call engine.zero_grad()), or a second one that did "
            "not begin at an output of the engine (call engine.backward(loss) for every loss)"
        )

    def finish_backward(self, boundary: bool) -> None:
        """After each backward: reduces what is left. Collective at stages 2 and 3, else where `boundary` is true."""
        if not self.at_once and not boundary:
            return
        self.finished = True
        for window in self._windows.values():
            self._reduce(window)
            window.launched, window.reduced_once = 0, True
            window.missing.update(window.shard.params)
            window.whole.clear()

    def take(self, shard: UnitShard) -> tuple[torch.Tensor, set[torch.nn.Parameter]]:
        """Ends the window of a unit.

        Returns:
            The averaged gradient shard (1-D, shard length, accumulation dtype; zeros if nothing was reduced), and the
            parameters that had a gradient on this rank.
        """
        assert self.finished or self.config.world == 1, "a window is taken that has not been reduced"
        window = self._windows[id(shard)]
        result, touched = window.result, window.touched
        window.result, window.touched, window.reduced_once = None, set(), False
        if result is None:
            result = torch.zeros(shard.numel, dtype=self.config.accumulation_dtype, device=shard.params[0].device)
        return result, touched

    def averaged(self, shard: UnitShard) -> torch.Tensor | None:
        """The averaged gradient shard of a window that has not ended, itself; `None` while there is none."""
        window = self._windows.get(id(shard))  # only the active blocks have one
        return None if window is None else window.result

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything held beside the `.grad` of parameters."""
        for window in self._windows.values():
            yield from window.whole.values()
            if window.result is not None:
                yield window.result
            for (_, packed), reduced, _ in window.in_flight:
                yield from (packed, reduced)

    def discard(self) -> None:
        """Drops everything gathered, whole gradients too. Waits for what is on its way; sends nothing."""
        self.finished = False
        for window in self._windows.values():
            self._drain(window, 0)
            for param in window.shard.params:
                param.grad = None
            window.whole.clear()
            window.result, window.touched, window.reduced_once = None, set(), False
            window.missing, window.launched = set(window.shard.params), 0

    def _launch_ready(self) -> None:
        """In one order over all windows: a rank whose batch misses the block must not send the always-active first."""
        for window in self._windows.values():
            if not self._launch_whole(window):
                return

    def _launch_whole(self, window: Window) -> bool:
        """Launches the buckets of a window that are whole, in order; returns whether that was all of them."""
        params = window.shard.params
        while window.launched < len(window.buckets):
            if not window.missing.isdisjoint(params[index] for index in window.buckets[window.launched]):
                return False
            self._launch(window)
        return True

    def _reduce(self, window: Window) -> None:
        while window.launched < len(window.buckets):
            self._launch(window)
        self._drain(window, 0)

    def _keep(self, window: Window, param: torch.nn.Parameter) -> None:
        """Until the boundary: in `.grad`, or beside it in another dtype."""
        assert param.grad is not None
        if param.grad.dtype != self.config.accumulation_dtype:
            grad = param.grad.to(self.config.accumulation_dtype)
            window.whole[param] = window.whole[param].add_(grad) if param in window.whole else grad
            param.grad = None

    @torch.no_grad()
    def _add_alone(self, window: Window, param: torch.nn.Parameter) -> None:
        shard = window.shard
        assert param.grad is not None
        if window.result is None:
            window.result = torch.zeros(shard.numel, dtype=self.config.accumulation_dtype, device=param.grad.device)
        segment = shard.segments[shard.position[param]]
        window.result[segment.offset : segment.offset + segment.numel].add_(param.grad.reshape(-1))
        param.grad = None

    @torch.no_grad()
    def _launch(self, window: Window) -> None:
        bucket, shard = window.buckets[window.launched], window.shard
        window.launched += 1
        params = [shard.params[index] for index in bucket]
        grads = [window.whole.pop(param, param.grad) for param in params]
        packed = shard.pack(bucket, grads, self.config.communication_dtype)
        for param in params:
            param.grad = None
        del grads
        span = shard.span(bucket)
        before_the_sum(packed, self.config)
        reduced = packed
        if self.config.stage > 0:
            reduced = torch.empty(span.stop - span.start, dtype=packed.dtype, device=packed.device)
        window.in_flight.append(((self._send(packed, reduced), packed), reduced, span))
        self._drain(window, self.max_in_flight)

    def _send(self, packed: torch.Tensor, reduced: torch.Tensor) -> Any:
        """Starts the sum of `packed` over the ranks, into `reduced` (stage 0: in place); returns its handle."""
        if self.config.stage == 0:
            return dist.all_reduce(packed, group=self.group, async_op=True)
        return dist.reduce_scatter_tensor(reduced, packed, group=self.group, async_op=True)

    @torch.no_grad()
    def _drain(self, window: Window, remaining: int) -> None:
        while len(window.in_flight) > remaining:
            (handle, _packed), reduced, span = window.in_flight.pop(0)
            handle.wait()
            after_the_sum(reduced, self.config)
            if window.result is None:
                dtype = self.config.accumulation_dtype
                window.result = torch.empty(window.shard.numel, dtype=dtype, device=reduced.device)
            if window.reduced_once:
                window.result[span].add_(reduced)
            else:
                window.result[span].copy_(reduced)


def before_the_sum(packed: torch.Tensor, config: ResolvedConfig) -> None:
    """What `gradient_predivide_factor` asks for."""
    if config.mean and config.predivide != 1.0:
        packed.mul_(1.0 / config.predivide)


def after_the_sum(reduced: torch.Tensor, config: ResolvedConfig) -> None:
    """The rest of the way to a mean."""
    if config.mean and config.predivide != config.world:
        reduced.mul_(config.predivide / config.world)
