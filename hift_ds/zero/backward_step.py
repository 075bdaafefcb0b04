"""The step of `hift.update` "backward": a unit of the active block is updated as soon as its gradient is whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hift_ds.shards import UnitShard
from hift_ds.state.unit_state import UnitState
from hift_ds.zero.step import Outcome, Step
from hift_ds.zero.step_check import Verdict
from hift_ds.zero.unit_gradients import LoneGradient, UnitReducer
from hift_ds.zero.update import Scaling

IN_FLIGHT = 1  # pieces of new weights on their way to other ranks while backward goes on


@dataclass
class _Made:
    """What has been made of a step so far.

    Attributes:
        fault: Why this rank cannot make it.
        touched: Parameters of the active block's units that have been here, which had a gradient on this rank.
        total: Sum of squares of their gradients, over all ranks, on the device.
        reached: As far as the host knows.
        refused: Why no update of it is made from here on; the same on all ranks.
        silent: Parameters seem never to get a gradient.
        left_out: Units whose gradient was not finite.
        updated: A unit has been updated.
    """

    fault: str | None
    rates: list[float]
    touched: set[torch.nn.Parameter] = field(default_factory=set)
    total: torch.Tensor | None = None
    reached: bool = False
    refused: Verdict | None = None
    silent: Verdict | None = None
    left_out: list[UnitState] = field(default_factory=list)
    updated: bool = False


class BackwardStep(Step):
    """Steps whose updates are made unit by unit, on all ranks in the same order (`GradientReducer`).

    Gradients and state on the device: one unit's, and the ring. The norm of the whole block is known when all is done,
    so there is no clipping by it. A gradient that is not finite leaves out its unit's update alone. What a rank finds
    wrong is raised by `take`, on every rank: an error in a hook would leave the others waiting.
    """

    _made: _Made | None = None
    _reducer: UnitReducer

    def begin(self) -> None:
        """As `Step.begin`; in the midst of a step nothing, because what is unheard is of this one."""
        if self._made is None:
            self.hear()

    @torch.no_grad()
    def give(self, shard: UnitShard) -> None:
        """Updates a unit, or what is always active. Collective."""
        state = next(state for state in self._states.all if state.shard is shard)
        made = self._made = self._made or self._begun()
        grad, touched = self._reducer.take(shard)
        of_block = state is not self._states.always
        if of_block:
            made.touched |= touched
        always = self._states.always
        reached = len(made.touched) + self._reducer.num_reached(None if always is None else always.shard)
        parts = grad.parts if isinstance(grad, LoneGradient) else [grad]
        check = self._check(parts, reached, self._note(state, touched), made.fault)
        del parts
        made.total = check.total if made.total is None else made.total + check.total
        norm = None
        if self.waits:
            verdict = check.verdict()
            if not self._heeds(made, state, verdict) or (of_block and not verdict.reached):
                return
            norm = verdict.norm / self._loss_scaler.loss_scale
        else:
            made.reached = True
            check.send(self._facts_out)
            self.unread.append((check, self._rotation.active_block, [state]))
        self.adopt_writes([state])
        if of_block:
            self._begin_anew(state, True)
        scaling = Scaling(self._loss_scaler.loss_scale, self._config.clip, norm, check.square)
        new = self._updated(state, grad, scaling, made.rates)
        made.updated = True
        del grad  # free before the next allocation
        self._published.send(shard, new, IN_FLIGHT)
        self._guard.renew(shard)
        state.torn = False

    def _begun(self) -> _Made:
        self._states.require_here()
        self.hear()
        fault = self.fault(self._states.training(self._rotation.active_block))
        self.hooks.before()
        return _Made(fault, self._rate.update(self._rotation.step, self.scheduler))

    def _heeds(self, made: _Made, state: UnitState, verdict: Verdict) -> bool:
        """Whether a unit is to be updated, where the host waits for the verdict."""
        made.reached |= verdict.reached > 0
        if verdict.silent:
            made.silent = verdict
        if verdict.faults or not verdict.agreed or not (verdict.reached or self._reach.skips):
            made.refused = verdict
        elif not verdict.finite:
            made.left_out.append(state)
        return made.refused is None and verdict.finite

    @property
    def half_made(self) -> bool:
        """As `Step.half_made`."""
        return self._made is not None and self._made.updated

    def drop(self) -> None:
        """What is left of the step is not made."""
        self._made = None
        self.arrive()

    def take(self, states: list[UnitState], fault: str | None) -> Outcome:
        """As `Step.take`: makes what backward has not, and ends the step."""
        self._reducer.give_rest()
        made, block = self._made, self._rotation.active_block
        self.drop()
        assert made is not None and made.total is not None  # of one unit at least
        if fault or made.fault:
            raise RuntimeError(fault or made.fault)
        for verdict in (made.refused, made.silent):
            if verdict is not None:
                self._refuse(verdict, block, states)
        shards: list[Any] = [state.shard for state in states if state is not self._states.always]
        self._reach.warn_partial(block, shards, made.touched)
        self.norm = self._as_norm(made.total)
        self.hooks.after()
        self.count_left_out([(block, [state]) for state in made.left_out])
        return Outcome(overflow=False, reached=made.reached)
