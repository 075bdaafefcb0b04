"""One optimizer step: norm and checks, the update of what trains now, and what is heard of it a step later."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist

from hift_ds.config.resolve import ResolvedConfig
from hift_ds.rotation.blocks import BlockPlan
from hift_ds.rotation.rotation import Rotation
from hift_ds.rotation.schedule import DelayedRate
from hift_ds.state.block_state import BlockState
from hift_ds.state.ring import lane_of
from hift_ds.zero.gradients import GradientReducer
from hift_ds.zero.guard import ModuleGuard
from hift_ds.zero.host_update import HostUpdate
from hift_ds.zero.reach import Reach
from hift_ds.zero.states import States
from hift_ds.zero.step_check import StepCheck, Verdict
from hift_ds.zero.step_hooks import StepHooks
from hift_ds.zero.update import BlockUpdate, Scaling
from hift_ds.zero.weights import write_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a step has come to.

    Attributes:
        overflow: The host knows that a gradient is not finite: nothing was updated.
        reached: The active block had a gradient, as far as the host knows.
    """

    overflow: bool
    reached: bool


class Step:
    """Steps, one after the other.

    Args:
        config: The run's.
        plan: Blocks.
        states: Masters and moments.
        holder: Its param groups hold the hyper-parameters.
        reducer: Has the gradients.
        rotation: Whose turn it is.
        rate: The rate in force.
        reach: Which parameters have had gradients.
        guard: What users do to the module.
        loss_scaler: DeepSpeed's.
        device: Where updates run.
        group: The data-parallel process group.

    Attributes:
        scheduler: The one that the engine steps; set when the engine has built it.
        waits: Whether a step waits for the device to know its norm.
        norm: Global gradient norm of the last step, unscaled: a tensor on the device, or inf; 0 before.
        unread: What the last step did not wait for.
    """

    def __init__(
        self, *, config: ResolvedConfig, plan: BlockPlan, states: States, holder: torch.optim.Optimizer,
        reducer: GradientReducer, rotation: Rotation, rate: DelayedRate, reach: Reach, guard: ModuleGuard,
        loss_scaler: Any, device: torch.device, group: object,
    ) -> None:  # fmt: skip
        self._config, self._plan, self._states, self._reducer = config, plan, states, reducer
        self._rotation, self._rate, self._reach, self._guard = rotation, rate, reach, guard
        self._loss_scaler, self._group = loss_scaler, group
        self.scheduler: Any = None
        self.norm: Any = 0.0
        self.hooks = StepHooks(holder)
        rule, groups = config.rule, holder.param_groups
        self.update = BlockUpdate(
            rule, groups, device, self._sum_over_shards, config.kernel, states.ring, config.hift.seed
        )
        self.host_update = None
        if config.home == "host":
            self.host_update = HostUpdate(rule, groups, device, self._sum_over_shards, states.blocks)
        # Where nothing needs to know on the host how a step's gradients are, it does not wait for the device.
        self.waits = (
            config.kernel != "triton" or config.home == "host" or bool(loss_scaler.dynamic) or self._reach.skips
        )
        self.unread: tuple[StepCheck, int, list[BlockState]] | None = None
        self._facts_out = lane_of(device)

    def take(self, states: list[BlockState], fault: str | None) -> Outcome:
        """Updates what trains now. Collective.

        Args:
            states: The active block's, then the always-active parameters'.
            fault: Why this rank cannot make the step, as a sentence; then all raise.

        Raises:
            RuntimeError: The update would be lost, or ranks disagree.
        """
        config, rotation, block = self._config, self._rotation, self._rotation.active_block
        grads, touched = map(list, zip(*(self._reducer.take(state.shard) for state in states), strict=True))
        ends = (rotation.at_turn_end, rotation.at_cycle_end)  # of a block, and of what is always active
        silent = sum(map(self._reach.note, (state.shard for state in states), touched, ends))
        check = StepCheck(
            grads, reached=len(touched[0]), must_reach=not self._reach.skips, silent=silent, faults=int(bool(fault)),
            block=block, stage=config.stage, world=config.world, group=self._group, fused=config.kernel == "triton",
        )  # fmt: skip
        if fault:
            raise RuntimeError(fault)
        overflow, reached, norm, scale = False, True, None, self._loss_scaler.loss_scale
        if self.waits:
            verdict = check.verdict()
            self._refuse(verdict, block, states)
            overflow, reached = not verdict.finite, verdict.reached > 0
            norm = verdict.norm / scale
        else:
            check.send(self._facts_out)
        self._reach.warn_partial(block, states[0].shard, touched[0])
        self.norm = float("inf")  # this and the dtypes are DeepSpeed's
        if not overflow:
            dtype = torch.float64 if config.stage == 3 else torch.float32
            self.norm = check.square.sqrt().squeeze().to(dtype) / scale
            self.adopt_writes(states)
            updates = reached or self._states.always is not None
            if updates:
                self.hooks.before()
            self._apply(states, grads, Scaling(scale, config.clip, norm, check.square), reached)
            if updates:
                self.hooks.after()
        if not self.waits:
            self.unread = (check, block, states)
        return Outcome(overflow, reached)

    def adopt_writes(self, states: list[BlockState]) -> None:
        """Weights that the user has written since the last update become the masters; only those elements change."""
        for state in states:
            written = self._guard.written(state.shard)
            if written:
                self.settle()
            for index in written:
                state.adopt(index)

    def settle(self) -> None:
        """Before the host reads or changes state: all updates have landed there and have been checked."""
        self.hear()
        self._states.settle()

    def hear(self) -> None:
        """Reads what the last step did not wait for."""
        if self.unread is None:
            return
        (check, block, states), self.unread = self.unread, None
        verdict = check.verdict()
        if not verdict.good:
            for state in states:
                state.step -= 1  # nothing was stored
        self._refuse(verdict, block, states)
        if not verdict.finite:
            logger.warning(
                "the gradient of block %d (%s) was not finite; its update was left out", block,
                self._plan.blocks[block].name,
            )  # fmt: skip

    def _refuse(self, verdict: Verdict, block: int, states: list[BlockState]) -> None:
        """Raises RuntimeError, on every rank, if an update would be lost."""
        if verdict.faults:
            raise RuntimeError("another rank cannot make this step; its own error says why")
        if not verdict.agreed:
            raise RuntimeError(f"ranks disagree on the active block (here {block}); was a rank restarted alone?")
        if not verdict.reached and not self._reach.skips:
            raise RuntimeError(self._reach.message(block))
        if verdict.silent:
            self._reach.check([state.shard for state in states])

    def _apply(self, states: list[BlockState], grads: list[torch.Tensor], scaling: Scaling, reached: bool) -> None:
        rates = self._rate.update(self._rotation.step, self.scheduler)
        if self.begins_anew():
            if reached and self._states.ring is not None and not states[0].extra:  # which is not in the ring
                states[0].forget()
            else:
                self.settle()
                states[0].reset()
        for index, state in enumerate(states):
            if state is states[0] and not reached:
                continue
            block = self._rotation.active_block if state is states[0] else len(self._states.blocks)
            update = self.host_update if self.host_update is not None and state.streams else self.update
            weights = update.run(state, grads[index], scaling, rates, block)
            grads[index] = torch.empty(0)  # free before the next allocation
            write_weights(state.shard, weights, self._group, self._config.zero.allgather_bucket_size)
        for state in states:  # all of a step, or none of it
            state.torn = False

    def begins_anew(self) -> bool:
        """Whether the active block's moments are reset by its coming update."""
        return self._config.hift.inactive_state == "reset" and self._rotation.at_turn_start

    def _sum_over_shards(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._config.shard_world > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor
