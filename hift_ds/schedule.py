"""The delayed learning rate: which rate is in force at a step, given the user's schedule.

The user's scheduler writes `group["lr"]` of the hyper-parameter holder as it always does; nothing here writes there.
What the update uses is the *rate in force*, latched from it.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any


class DelayedRate:
    """Latches one learning rate per param group.

    Args:
        param_groups: The holder's param groups, whose "lr" the user's scheduler drives. Kept by reference.
        lr_update: `cycle`, `paper` or `step` (design.md, section 4; README, "Learning rate").
        steps_per_cycle: Optimizer steps per cycle.
    """

    def __init__(self, param_groups: list[dict[str, Any]], lr_update: str, steps_per_cycle: int) -> None:
        self.param_groups = param_groups
        self.lr_update = lr_update
        self.steps_per_cycle = steps_per_cycle
        self.rates: list[float] | None = None

    def update(self, at_cycle_start: bool, scheduler: Any | None) -> list[float]:
        """Returns the rates in force at the coming step, one per param group; call once, just before the update.

        Args:
            at_cycle_start: Whether the coming step is the first of a cycle.
            scheduler: The scheduler that the engine steps, or `None`. Without one the caller may drive the rate; it is
                then latched as found at the cycle's start, and again while it is still 0 (a caller's warm-up that
                begins at 0 would otherwise make the whole first cycle a no-op).
        """
        if self.lr_update == "step":
            self.rates = _present(self.param_groups)
        elif at_cycle_start or self.rates is None:
            ahead = self.lr_update == "cycle" and scheduler is not None
            steps = self.steps_per_cycle // 2
            self.rates = look_ahead(scheduler, self.param_groups, steps) if ahead else _present(self.param_groups)
        elif scheduler is None and not any(self.rates):
            self.rates = _present(self.param_groups)
        return self.rates


def look_ahead(scheduler: Any, param_groups: list[dict[str, Any]], steps: int) -> list[float]:
    """The rates that `scheduler` will set `steps` steps from now; scheduler and groups are left as they were.

    Works for any scheduler with `step()` whose state is in its attributes and in `param_groups` (all of torch's and
    DeepSpeed's): it is stepped and put back. A scheduler that refuses to go on (OneCycleLR or a table past its end) or
    that needs an argument (ReduceLROnPlateau) gives the last rates that it reached.
    """
    attributes = _snapshot(scheduler, keep=param_groups)
    groups = [
        {key: (value, _copied(value)) for key, value in group.items() if key != "params"} for group in param_groups
    ]
    rates = _present(param_groups)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(steps):
                try:
                    scheduler.step()
                except Exception:  # whatever it is, the user's own step() meets it when the run gets there
                    break
                rates = _present(param_groups)
        return rates
    finally:
        _restore(attributes)
        for group, saved in zip(param_groups, groups, strict=True):
            for key in [key for key in group if key != "params" and key not in saved]:
                del group[key]
            for key, (value, copied) in saved.items():
                group[key] = _put_back(value, copied)


def _present(param_groups: list[dict[str, Any]]) -> list[float]:
    return [float(group["lr"]) for group in param_groups]


def _copied(value: Any) -> Any:
    return value.clone() if hasattr(value, "clone") else copy.copy(value)


def _put_back(value: Any, copied: Any) -> Any:
    # torch's schedulers write a tensor rate in place; whoever else holds that tensor must find the old value in it.
    return value.copy_(copied) if hasattr(value, "clone") else copied


def _snapshot(scheduler: Any, keep: list[dict[str, Any]]) -> list[tuple[Any, dict[str, Any]]]:
    """The attributes of a scheduler and of the schedulers inside it, containers copied, optimizers left alone."""
    seen: set[int] = set()
    found: list[tuple[Any, dict[str, Any]]] = []

    def visit(part: Any) -> None:
        if id(part) in seen or not hasattr(part, "__dict__") or hasattr(part, "param_groups"):
            return
        seen.add(id(part))
        saved = {}
        for name, value in vars(part).items():
            holds_groups = isinstance(value, list) and any(item is group for item in value for group in keep)
            saved[name] = copy.copy(value) if isinstance(value, (list, dict, set)) and not holds_groups else value
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if hasattr(inner, "step") and not hasattr(inner, "param_groups"):
                    visit(inner)
        found.append((part, saved))

    visit(scheduler)
    return found


def _restore(attributes: list[tuple[Any, dict[str, Any]]]) -> None:
    for part, saved in attributes:
        for name in [name for name in vars(part) if name not in saved]:
            delattr(part, name)
        vars(part).update(saved)


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
