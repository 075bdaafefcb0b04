"""One optimizer step: norm and checks, the update of what trains now, and what is heard of it a step later."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist

from hift_ds.config.resolve import ResolvedConfig
from hift_ds.rotation.blocks import BlockPlan
from hift_ds.rotation.names import some
from hift_ds.rotation.param_groups import groups_fault, step_fault
from hift_ds.rotation.rotation import Rotation
from hift_ds.rotation.schedule import DelayedRate
from hift_ds.state.ring import lane_of
from hift_ds.state.unit_state import UnitState, layout_fault
from hift_ds.zero.gradients import GradientReducer
from hift_ds.zero.guard import ModuleGuard
from hift_ds.zero.host_update import HostUpdate
from hift_ds.zero.reach import Reach
from hift_ds.zero.states import States
from hift_ds.zero.step_check import StepCheck, Verdict
from hift_ds.zero.step_hooks import StepHooks
from hift_ds.zero.update import Gradient, Scaling, UnitUpdate
from hift_ds.zero.weights import OwnWeights, Publication, SentWeights

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
        left_out: Steps of which an update, or a part, was left out, and which `Outcome.overflow` has not told.
    """

    def __init__(
        self, *, config: ResolvedConfig, plan: BlockPlan, states: States, holder: torch.optim.Optimizer,
        reducer: GradientReducer, rotation: Rotation, rate: DelayedRate, reach: Reach, guard: ModuleGuard,
        loss_scaler: Any, device: torch.device, group: object,
    ) -> None:  # fmt: skip
        self._config, self._plan, self._states, self._reducer = config, plan, states, reducer
        self._indices = {id(state): index for index, state in enumerate(states.all)}
        self._published = Publication(group, config.zero.allgather_bucket_size, device, config.sends_weights)
        self._rotation, self._rate, self._reach, self._guard = rotation, rate, reach, guard
        self._loss_scaler, self._group, self._holder = loss_scaler, group, holder
        self._grouped = [list(map(id, group["params"])) for group in holder.param_groups]
        self.scheduler: Any = None
        self.norm: Any = 0.0
        self.hooks = StepHooks(holder)
        rule, groups = config.rule, holder.param_groups
        self.update = UnitUpdate(
            rule, groups, device, self._sum_over_shards, config.kernel, states.ring, config.hift.seed
        )
        self.host_update = None
        if config.home == "host":
            self.host_update = HostUpdate(rule, groups, device, self._sum_over_shards, states.units)
        # Where nothing needs to know on the host how a step's gradients are, it does not wait for the device.
        self.waits = (
            config.kernel != "triton" or config.home == "host" or bool(loss_scaler.dynamic) or self._reach.skips
        )
        self.unread: list[tuple[StepCheck, int, list[UnitState]]] = []
        self.left_out = 0
        self._facts_out = lane_of(device)

    def begin(self) -> None:
        """Before a step: what is wrong with the last one is said first."""
        self.hear()

    @property
    def half_made(self) -> bool:
        """Whether a part of the coming step has been made already."""
        return False

    def drop(self) -> None:
        """The window's gradients are dropped."""

    def arrive(self) -> None:
        """A backward has ended: new weights that are on their way are waited for."""
        self._published.wait()

    def fault(self, states: list[UnitState]) -> str | None:
        """Why this rank cannot make a step, as a sentence, or `None`."""
        holder = self._holder
        fault = self._guard.fault() or groups_fault(holder.param_groups, self._grouped) or step_fault(holder)
        return fault or layout_fault(self._config.rule, holder.param_groups, states)

    def take(self, states: list[UnitState], fault: str | None) -> Outcome:
        """Updates what trains now. Collective.

        Args:
            states: Those of `States.training`.
            fault: Why this rank cannot make the step, as a sentence; then all raise.

        Raises:
            RuntimeError: The update would be lost, or ranks disagree.
        """
        block, always = self._rotation.active_block, self._states.always
        grads, touched = map(list, zip(*(self._reducer.take(state.shard) for state in states), strict=True))
        mine = set().union(*(params for state, params in zip(states, touched, strict=True) if state is not always))
        silent = sum(map(self._note, states, touched))
        check = self._check(grads, len(mine), silent, fault)
        if fault:
            raise RuntimeError(fault)
        overflow, reached, norm, scale = False, True, None, self._loss_scaler.loss_scale
        if self.waits:
            verdict = check.verdict()
            self._refuse(verdict, block, states)
            overflow, reached = not verdict.finite, verdict.reached > 0
            norm = verdict.norm / scale
            if overflow and not self._loss_scaler.dynamic:  # else it is lowered, and says so
                if self._config.hift.not_finite == "stop":
                    self.left_out += 1  # which the engine does not come to count
                self._say_left_out(block, states)
        else:
            check.send(self._facts_out)
        self._reach.warn_partial(block, [state.shard for state in states if state is not always], mine)
        self.norm = float("inf")
        if not overflow:
            self.norm = self._as_norm(check.square)
            self.adopt_writes(states)
            updates = reached or always is not None
            if updates:
                self.hooks.before()
            self._apply(states, grads, Scaling(scale, self._config.clip, norm, check.square), reached)
            if updates:
                self.hooks.after()
        if not self.waits:
            self.unread.append((check, block, states))
        return Outcome(overflow, reached)

    def _as_norm(self, square: torch.Tensor) -> torch.Tensor:
        """What `norm` is after a step: the dtypes are DeepSpeed's."""
        dtype = torch.float64 if self._config.stage == 3 else torch.float32
        return square.sqrt().squeeze().to(dtype) / self._loss_scaler.loss_scale

    def _note(self, state: UnitState, touched: set[torch.nn.Parameter]) -> int:
        always = state is self._states.always
        return self._reach.note(
            state.shard, touched, self._rotation.at_cycle_end if always else self._rotation.at_turn_end
        )

    def _check(self, grads: list[torch.Tensor], reached: int, silent: int, fault: str | None) -> StepCheck:
        config = self._config
        return StepCheck(
            grads, reached=reached, must_reach=not self._reach.skips, silent=silent, faults=int(bool(fault)),
            block=self._rotation.active_block, stage=config.stage, world=config.world, group=self._group,
            fused=config.kernel == "triton",
        )  # fmt: skip

    def adopt_writes(self, states: list[UnitState]) -> None:
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
        unread, self.unread = self.unread, []
        heard = [(check.verdict(), block, states) for check, block, states in unread]
        for verdict, _, states in heard:
            if not verdict.good:
                for state in states:
                    state.step -= 1  # nothing was stored
        for verdict, block, states in heard:
            self._refuse(verdict, block, states)
        self.count_left_out([(block, states) for verdict, block, states in heard if not verdict.finite])

    def count_left_out(self, left_out: list[tuple[int, list[UnitState]]]) -> None:
        """Updates that were left out: of a step, by its block, all of its states or some."""
        if left_out:
            self.left_out += 1
            self._say_left_out(left_out[0][0], [state for _, states in left_out for state in states])

    def _say_left_out(self, block: int, states: list[UnitState]) -> None:
        """Raises RuntimeError, on every rank, where the run is to stop."""
        whole = len(states) == len(self._states.training(block))
        part = "" if whole else f" of {some([fqn for state in states for fqn in state.shard.fqns])}"
        what = f"the gradient{part} of block {block} ({self._plan.blocks[block].name}) was not finite"
        if self._config.hift.not_finite == "stop":
            raise RuntimeError(
                f"hift.not_finite='stop': {what} (inf or nan in the loss or in its backward); its update was left out: "
                'look at the batch, the rate and the loss, or go on with "not_finite": "skip"'
            )
        logger.warning("%s; its update was left out", what)

    def _refuse(self, verdict: Verdict, block: int, states: list[UnitState]) -> None:
        """Raises RuntimeError, on every rank, if an update would be lost."""
        if verdict.faults:
            raise RuntimeError("another rank cannot make this step; its own error says why")
        if not verdict.agreed:
            raise RuntimeError(f"ranks disagree on the active block (here {block}); was a rank restarted alone?")
        if not verdict.reached and not self._reach.skips:
            raise RuntimeError(self._reach.message(block))
        if verdict.silent:
            self._reach.check([state.shard for state in states])

    def _apply(self, states: list[UnitState], grads: list[torch.Tensor], scaling: Scaling, reached: bool) -> None:
        rates = self._rate.update(self._rotation.step, self.scheduler)
        for state in states:
            if state is not self._states.always:
                self._begin_anew(state, reached)
        for index, state in enumerate(states):
            if reached or state is self._states.always:
                new = self._updated(state, grads[index], scaling, rates)
                grads[index] = torch.empty(0)  # free before the next allocation
                self._published.send(state.shard, new, 0)
        for state in states:  # all of a step, or none of it
            state.torn = False

    def _begin_anew(self, state: UnitState, reached: bool) -> None:
        """Before the update of a unit of the active block: its moments begin anew where the block's do."""
        if self.begins_anew():
            if reached and self._states.ring is not None and not state.extra:  # which is not in the ring
                state.forget()
            else:
                self.settle()
                state.reset()

    def _updated(
        self, state: UnitState, grad: Gradient, scaling: Scaling, rates: list[float]
    ) -> OwnWeights | SentWeights:
        update = self.host_update if self.host_update is not None and state.streams else self.update
        new = self._published.of(state.shard)
        update.run(state, grad, new, scaling, rates, self._indices[id(state)])
        return new

    def begins_anew(self) -> bool:
        """Whether the active block's moments are reset by its coming update."""
        return self._config.hift.inactive_state == "reset" and self._rotation.at_turn_start

    def _sum_over_shards(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._config.shard_world > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor
