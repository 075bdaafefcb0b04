"""How well methods learn, compared: the rows, the choice of rates, and which run comes next. Nothing imports torch.

Every method's rate is chosen on the validation rows, at as many steps as full fine-tuning has, with the first seed.
Then it is trained anew with each seed and meets the test rows, once: at equal steps, and at equal seconds, that is for
as many steps as it makes in the time of full fine-tuning. A row of the file is one such run, or the costs of a method;
its key is its settings, and a row that is there is not run again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hift_ds.config.keys import FRESH
from hift_ds.recipes.quality_plan import METHODS, Method, Plan, Task

Settings = dict[str, Any]
Result = dict[str, Any]

UNTRAINED = "untrained"


class Rows:
    """The rows of a JSON-lines file, by their settings; each is there as soon as its run has ended.

    Raises:
        ValueError: A line of the file is no row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[Result] = _read(path) if path.exists() else []
        self._known = {_key(row["settings"]): row for row in self.all}

    def get(self, settings: Settings, run: Callable[[Settings], Result]) -> Result:
        """The row of these settings: the one that is there, else what `run` makes of them."""
        key = _key(settings)
        if key not in self._known:
            row = {"settings": settings, **run(settings)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.all.append(row)
            self._known[key] = row
        return self._known[key]


def _read(path: Path) -> list[Result]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not JSON ({error.msg}); delete the line, and its run is made again"
            ) from None
    return rows


def _key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)


def rate_at(place: int) -> float:
    """The ladder of rates: 1, 3, 10, 30 and so on; place 0 is 1."""
    return float(f"{(1, 3)[place % 2]}e{place // 2}")


def score(metrics: Result, counts: str) -> tuple[float, float]:
    """What the choice of a rate makes the most of: accuracy, and of equals the least loss; a loss, where it counts."""
    loss = metrics["loss"]
    if loss is None:  # it diverged
        return (-math.inf, -math.inf)
    return (metrics["accuracy"] if counts == "accuracy" else -loss, -loss)


def search(of_place: Callable[[int], tuple[float, float]], middle: int, plan: Plan) -> tuple[int, bool]:
    """The place of the best rate, and whether rates on both sides of it were worse."""
    lowest = middle - (plan.num_rates - 1) // 2
    found = {place: of_place(place) for place in range(lowest, lowest + plan.num_rates)}
    for _ in range(plan.num_extensions):
        best = max(found, key=found.__getitem__)
        if best not in (min(found), max(found)):
            break
        place = best - 1 if best == min(found) else best + 1
        found[place] = of_place(place)
    best = max(found, key=found.__getitem__)
    return best, min(found) < best < max(found)


def methods_of(task: Task, plan: Plan) -> list[Method]:
    """The plan's contestants in a task; where nothing is fresh, there is no head that could take turns."""
    methods = [METHODS[name] for name in plan.methods]
    return [method for method in methods if task.fresh_head or method.always_active in (None, FRESH)]


def study(
    task: Task, plan: Plan, rows: Rows, train: Callable[[Settings], Result], cost: Callable[[Settings], Result]
) -> None:
    """Runs what the rows lack of a task; seed by seed, so that a study that is stopped has all methods of the first.

    Args:
        train: Makes a run of settings.
        cost: Measures a method's memory, and its speed: steps in the time of one of full fine-tuning.
    """
    methods = methods_of(task, plan)
    if not task.fresh_head:
        rows.get(settings_of(task, None, "test", "steps", 0, 0.0, 0), train)
    rates = {method.name: chosen_rate(task, method, plan, rows, train)[0] for method in methods}
    speeds = {method.name: rows.get(cost_settings(task, method), cost)["speed"] for method in methods}
    for seed in plan.seeds:
        for budget in plan.budgets:
            for method in methods:
                if budget == "seconds" and method.kind == "full":
                    continue  # its steps and its seconds are one budget
                steps = task.steps if budget == "steps" else round(task.steps * speeds[method.name])
                rows.get(settings_of(task, method, "test", budget, steps, rates[method.name], seed), train)


def cost_settings(task: Task, method: Method) -> Settings:
    """Of the measurement of a method's costs."""
    return {"kind": "costs", "task": task.name, **task.recipe, "method": described(method)}


def chosen_rate(
    task: Task, method: Method, plan: Plan, rows: Rows, train: Callable[[Settings], Result]
) -> tuple[float, bool]:
    """The method's rate by the validation rows, and whether the grid went beyond it on both sides."""

    def of_place(place: int) -> tuple[float, float]:
        settings = settings_of(task, method, "validation", "steps", task.steps, rate_at(place), plan.seeds[0])
        return score(rows.get(settings, train)["metrics"], task.counts)

    place, inside = search(of_place, task.middle_place + method.places_above, plan)
    return rate_at(place), inside


def settings_of(
    task: Task, method: Method | None, part: str, budget: str, steps: int, rate: float, seed: int
) -> Settings:
    """Of one run; without a method, of the model as it comes."""
    return {
        "kind": "run", "task": task.name, **task.recipe, "method": described(method), "part": part, "budget": budget,
        "steps": steps, "rate": rate, "seed": seed,
    }  # fmt: skip


def described(method: Method | None) -> Settings:
    """A method as settings say it."""
    if method is None:
        return {"name": UNTRAINED}
    active = list(method.always_active) if isinstance(method.always_active, tuple) else method.always_active
    return {
        "name": method.name, "layers_per_block": method.layers_per_block, "always_active": active, "rank": method.rank,
    }  # fmt: skip
