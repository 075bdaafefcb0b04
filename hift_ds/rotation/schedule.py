"""The delayed learning rate: which rate is in force at a step, given the user's schedule.

The user's scheduler writes `group["lr"]` of the hyper-parameter holder as it always does; nothing here writes there.
What the update uses is the *rate in force*, latched from it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from hift_ds.rotation.rewind import CannotRewind, Rewind

logger = logging.getLogger(__name__)


class DelayedRate:
    """Latches one learning rate per param group.

    Args:
        param_groups: The holder's param groups, whose "lr" the user's scheduler drives. Kept by reference.
        lr_update: `cycle`, `paper` or `step` (docs/running.md, "Learning rate").
        steps_per_cycle: Optimizer steps per cycle.

    Attributes:
        rates: In force; `None` before the first step.
        total_steps: Optimizer steps of the whole run; `None` = as many as the schedule takes to come to 0.
    """

    def __init__(self, param_groups: list[dict[str, Any]], lr_update: str, steps_per_cycle: int) -> None:
        self.param_groups = param_groups
        self.lr_update = lr_update
        self.steps_per_cycle = steps_per_cycle
        self.rates: list[float] | None = None
        self.total_steps: int | None = None
        self._looks_ahead = lr_update == "cycle" and steps_per_cycle > 1

    def try_look_ahead(self, scheduler: Any | None, agree: Callable[[Callable[[], None]], None]) -> None:
        """Where a rank's scheduler would not come back from looking ahead, no rank looks ahead; says so once.

        Args:
            scheduler: The scheduler that the engine steps, or `None`.
            agree: Runs a check on every rank and raises on all where it raises on one. Collective.
        """

        def look_twice() -> None:
            if scheduler is not None:
                looks = [look_ahead(scheduler, self.param_groups, self.steps_per_cycle) for _ in range(2)]
                if repr(looks[0]) != repr(looks[1]):
                    raise CannotRewind("it counts somewhere out of reach: asked twice, it gives other rates")

        if self._looks_ahead:
            try:
                agree(look_twice)
            except Exception as reason:  # whatever it is on one rank, no other may go on without it
                self._give_up(scheduler, reason)

    def update(self, step: int, scheduler: Any | None) -> list[float]:
        """Returns the rates in force at the coming step, one per param group; call once, just before the update.

        Latched at a cycle's start, and in each group again while it is 0: a warm-up that begins at 0 would otherwise
        make the first cycle a no-op wherever it cannot be foreseen.

        Args:
            step: Optimizer steps made.
            scheduler: The scheduler that the engine steps, or `None`. Without one the caller may drive the rate.
        """
        if self.rates is None:
            self._warn_of_unknown_scheduler(scheduler)
        if self.lr_update == "step":
            self.rates = _present(self.param_groups)
        elif step % self.steps_per_cycle == 0 or self.rates is None:
            self.rates = self._of_cycle(step, scheduler)
        elif not all(self.rates):
            self.rates = [old or new for old, new in zip(self.rates, _present(self.param_groups), strict=True)]
        return self.rates

    def _of_cycle(self, step: int, scheduler: Any | None) -> list[float]:
        if scheduler is not None and self._looks_ahead:
            left = self.steps_per_cycle if self.total_steps is None else max(1, self.total_steps - step)
            try:
                rows = look_ahead(scheduler, self.param_groups, min(left, self.steps_per_cycle))
                return [middle_of_run(series) for series in zip(*rows, strict=True)]
            except CannotRewind as reason:
                self._give_up(scheduler, reason)
        return _present(self.param_groups)

    def _warn_of_unknown_scheduler(self, scheduler: Any | None) -> None:
        driven = any("initial_lr" in group for group in self.param_groups)  # torch's schedulers write it
        if scheduler is None and driven and self.lr_update != "step" and self.steps_per_cycle > 1 and _is_rank_0():
            logger.warning(
                "hift.lr_update=%r: a scheduler that the engine does not step drives the learning rate, so each cycle "
                "has the rate at its start, or the first after it that is not 0; give it to initialize as "
                "lr_scheduler, or, where something else steps it, to engine.follow_schedule", self.lr_update,
            )  # fmt: skip

    def _give_up(self, scheduler: Any, reason: Exception) -> None:
        self._looks_ahead = False
        if _is_rank_0():
            logger.warning(
                "hift.lr_update='cycle': the scheduler %s cannot be asked for the rates of a cycle (%s), so each cycle "
                "has the rate at its start, or the first after it that is not 0", type(scheduler).__name__, reason,
            )  # fmt: skip


def middle_of_run(series: Sequence[float]) -> float:
    """The rate of a cycle, of those that the schedule has at its steps: the middle one of what the run still has.

    The run ends where the schedule comes back to 0: there a linear decay stays, a cosine rises again, a linear
    OneCycleLR turns negative. Where a warm-up is still 0 in the middle, its first rate. So it is 0 only if all are.
    """
    first = next((step for step, rate in enumerate(series) if rate > 0), 0)
    end = next((step for step in range(first, len(series)) if not series[step] > 0), len(series))
    return series[max(first, end // 2)]


def look_ahead(scheduler: Any, param_groups: list[dict[str, Any]], steps: int) -> list[list[float]]:
    """The rates at the coming `steps` steps, this one first; scheduler and groups are left as they were.

    Works for any scheduler with `step()` whose state can be put back (`hift_ds.rotation.rewind`; all of torch's,
    DeepSpeed's and transformers'). One that refuses to go on (OneCycleLR or a table past its end) or that needs an
    argument (ReduceLROnPlateau) gives the rates that it reached.

    Raises:
        CannotRewind: Its state cannot be put back; nothing has been changed.
    """
    rewind = Rewind(scheduler, param_groups)
    rows = [_present(param_groups)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(steps - 1):
                try:
                    scheduler.step()
                except Exception:  # whatever it is, the user's own step() meets it when the run gets there
                    break
                rows.append(_present(param_groups))
        return rows
    finally:
        rewind.back()


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _present(param_groups: list[dict[str, Any]]) -> list[float]:
    return [float(group["lr"]) for group in param_groups]


class CycleScheduler:
    """Stands before the user's scheduler for `lr_update="paper"`: `step()` goes through once per cycle.

    Source: HiFT, arXiv 2401.15207, Algorithm 1: the rate changes only when all layers have been updated once.
    Everything else (state_dict, get_last_lr, ...) is the user's scheduler's.
    """

    def __init__(self, scheduler: Any, rotation: Any) -> None:
        self.scheduler = scheduler
        self._rotation = rotation

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Called by the engine after each applied step, when the rotation has already advanced."""
        if self._rotation.at_cycle_start:
            self.scheduler.step(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # unpickling and copying ask before __init__ has run
            raise AttributeError(name)
        return getattr(self.scheduler, name)


def step_once_per_cycle(scheduler: Any, rotation: Any) -> None:
    """As CycleScheduler, on a scheduler that others hold: its class becomes one whose `step()` waits for the cycle.

    Args:
        scheduler: Of torch's kind; its state and its other methods stay its own. A second call changes nothing.
        rotation: Has already advanced when `step()` is called.
    """
    own = type(scheduler)
    if getattr(own, "_once_per_cycle", False):
        return

    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        if rotation.at_cycle_start:
            own.step(self, *args, **kwargs)

    scheduler.__class__ = type(own.__name__, (own,), {"step": step, "_once_per_cycle": True})
