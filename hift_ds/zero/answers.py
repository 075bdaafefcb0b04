"""What DeepSpeed's engine, its checkpoint files, its schedulers and tools read and call of an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer

from hift_ds.rotation.schedule import DelayedRate
from hift_ds.state.ring import Ring
from hift_ds.state.unit_state import UnitState
from hift_ds.zero.states import States
from hift_ds.zero.step import Step
from hift_ds.zero.traces import partition_all


class ReadByDeepSpeed(ZeROOptimizer):
    """The part of HiFTOptimizer that only answers; HiFTOptimizer has what it answers from."""

    optimizer: Any
    loss_scaler: Any
    offload: Any
    rate: DelayedRate
    _kept: States
    _step: Step
    _scheduler: Any
    _loads: bool

    @property
    def states(self) -> list[UnitState]:
        """Of the layer units, block by block; none after `destroy`."""
        return self._kept.units

    @property
    def block_states(self) -> list[list[UnitState]]:
        """The same by block, each block's in the order in which they are updated."""
        return self._kept.blocks

    @property
    def always(self) -> UnitState | None:
        """Of the always-active parameters."""
        return self._kept.always

    @property
    def ring(self) -> Ring | None:
        """What states stream through."""
        return self._kept.ring

    @property
    def scheduler(self) -> Any:
        """The one that the engine steps; set when the engine has built it."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._scheduler = self._step.scheduler = scheduler

    def follow(self, scheduler: Any) -> None:
        """The rates in force come from a scheduler that somebody else steps and saves."""
        self._step.scheduler = scheduler

    @property
    def _global_grad_norm(self) -> Any:
        return self._step.norm

    @property
    def param_groups(self) -> list[dict]:
        """The holder's param groups: the rate here is the scheduler's, `rates` is the one in force."""
        return self.optimizer.param_groups

    @property
    def bit16_groups(self) -> list[list[torch.nn.Parameter]]:
        """Every trained parameter, in shard order, a list per unit."""
        return [list(state.shard.params) for state in self._kept.all]

    fp16_groups = bit16_groups

    @property
    def loss_scale(self) -> float:
        """The loss scale in force (1 outside fp16)."""
        return self.loss_scaler.loss_scale

    cur_scale = loss_scale

    def get_lr(self) -> float:
        """The first param group's rate, which the scheduler sets; `rates` are those in force."""
        return self.param_groups[0]["lr"]

    def set_lr(self, lr: float) -> None:
        """Sets every param group's rate, as a scheduler does."""
        for group in self.param_groups:
            group["lr"] = lr

    @property
    def rates(self) -> list[float]:
        """Learning rate in force, one per param group."""
        return list(self.rate.rates or [float(group["lr"]) for group in self.param_groups])

    @property
    def parameter_offload(self) -> Any:
        """DeepSpeed's ZeRO-3 parameter manager, by the name that tools look for it.

        Raises:
            AttributeError: Below stage 3, where there is none.
        """
        if self.offload is None:
            raise AttributeError("parameter_offload: there is none below ZeRO stage 3")
        return self.offload

    def backward_epilogue(self, **kwargs: Any) -> None:
        """Stage 3: releases what a backward that stopped early has left gathered."""
        if self.offload is not None:
            # DeepSpeed 0.18 has nothing finer than the release of everything.
            release = getattr(self.offload, "release_backward_leftovers", self.checkpoint_event_prologue)
            release()

    def finalize_gradient_accumulation_boundary(self) -> None:
        """Called at the boundary with `managed_gradient_accumulation: false`; each backward has already reduced."""

    def checkpoint_event_prologue(self) -> None:
        """Stage 3: partitions everything, so that saving and loading see shards. Collective."""
        if self.offload is not None:
            partition_all(self.offload)

    def checkpoint_event_epilogue(self) -> None:
        """Stage 3: gathers the small persistent parameters again. Collective."""
        if self.offload is not None and self.offload.persistent_parameters and not self._loads:
            self.offload.persistent_parameters[0].all_gather(self.offload.persistent_parameters)

    @property
    def state(self) -> Any:
        """The holder's, which is empty.

        DeepSpeed's is keyed by flat partitions, in which nobody finds a parameter either; masters and moments of a
        parameter, which lie in shards, in streams and perhaps in 8 bits, are read with `deepspeed.utils.safe_get_*`.
        """
        return self.optimizer.state

    def empty_partition_cache(self) -> None:
        """Stage 3: partitions everything; else nothing is gathered. Collective."""
        self.checkpoint_event_prologue()
