"""The comparison of quality without a model: which runs are made, how rates are chosen, tables and pictures of rows."""

import json
from dataclasses import replace

import pytest
from matplotlib.image import imread

from hift_ds.recipes import quality_plan
from hift_ds.recipes.quality import UNTRAINED, Rows, chosen_rate, rate_at, score, search, study
from hift_ds.recipes.quality_plan import METHODS, TASKS, Plan
from hift_ds.recipes.quality_report import groups_of, write_report

TASK = replace(TASKS["banking77"], steps=40)
PLAN = Plan(("full", "hift_m1", "lora_r8"), seeds=(0, 1), num_rates=3, num_extensions=2)
SPEED = {"full": 1.0, "hift_m1": 2.0, "hift_m1_head_in_turn": 2.0, "lora_r8": 1.26}
WHERE = {"date": "2026-11-27", "device": "cpu: x", "threads": 1, "versions": {"torch": "2.13.0"}}


class FakeRuns:
    """Stands in for training: the accuracy falls with the distance of the rate from 1e-3, and grows with the seed."""

    def __init__(self):
        self.made = []

    def train(self, settings):
        self.made.append(settings)
        distance = abs(next(i for i in range(-14, 2) if rate_at(i) == settings["rate"]) + 6) if settings["rate"] else 9
        accuracy = 0.8 - 0.05 * distance + 0.01 * settings["seed"]
        return {
            "metrics": {"loss": 1.5 - accuracy, "accuracy": accuracy, "count": 100}, "unrelated_loss": None,
            "trained_parameters": 10, "seconds": 3.0, "load_average": [1.0, 2.0],
            "cpu_seconds": 2.0, **WHERE,
        }  # fmt: skip

    def cost(self, settings):
        self.made.append(settings)
        peak = {"allocated": 2**20, "gradients": 2**19, "state": 2**18}
        return {"speed": SPEED[settings["method"]["name"]], "peak": peak}


@pytest.fixture
def runs():
    return FakeRuns()


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path / "rows.jsonl")


def final_runs(runs, **wanted):
    return [s for s in runs.made if s.get("part") == "test" and all(s[key] == value for key, value in wanted.items())]


# rows


def test_a_row_that_is_there_is_not_run_again_and_one_that_is_not_is_the_only_one_run(runs, rows, tmp_path):
    study(TASK, PLAN, rows, runs.train, runs.cost)
    written = rows.path.read_text().splitlines()
    assert len(written) == len(runs.made) == len({json.dumps(made, sort_keys=True) for made in runs.made})

    again = FakeRuns()
    study(TASK, PLAN, Rows(rows.path), again.train, again.cost)
    assert again.made == []

    rows.path.write_text("\n".join(written[:4] + written[5:]) + "\n")  # cut off
    study(TASK, PLAN, Rows(rows.path), again.train, again.cost)
    assert again.made == [json.loads(written[4])["settings"]]
    assert sorted(rows.path.read_text().splitlines()) == sorted(written)


def test_other_settings_are_another_row(runs, rows):
    study(TASK, PLAN, rows, runs.train, runs.cost)
    longer = FakeRuns()
    study(replace(TASK, num_test=7), PLAN, rows, longer.train, longer.cost)
    assert len(longer.made) == len(runs.made)


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"settings": {}}\n{"settings": {"ki')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not JSON .*delete the line"):
        Rows(path)


# rates


@pytest.mark.parametrize(
    ("best", "tried", "inside"),
    [
        (0, {-1, 0, 1}, True),
        (1, {-1, 0, 1, 2}, True),
        (-2, {-3, -2, -1, 0, 1}, True),
        (5, {-1, 0, 1, 2, 3}, False),  # as far as two extensions go
    ],
)
def test_a_grid_grows_by_one_rate_while_its_best_is_at_the_edge(best, tried, inside):
    asked = []

    def of_place(place):
        asked.append(place)
        return (-abs(place - best), 0.0)

    found = search(of_place, 0, PLAN)
    assert (set(asked), len(asked)) == (tried, len(tried))
    assert found == (max(-3, min(best, 3)), inside)


def test_the_ladder_of_rates_has_no_rounding():
    assert [rate_at(place) for place in (-8, -7, -6, -5, 0, 1)] == [1e-4, 3e-4, 1e-3, 3e-3, 1.0, 3.0]


def test_a_diverged_run_is_worse_than_any_and_equal_accuracies_go_by_loss():
    def of(accuracy, loss):
        return score({"accuracy": accuracy, "loss": loss}, "accuracy")

    assert of(0.9, None) < of(0.0, 9.0) < of(0.5, 2.0) < of(0.5, 1.0)
    assert score({"accuracy": 0.9, "loss": 2.0}, "loss") < score({"accuracy": 0.1, "loss": 1.0}, "loss")


def test_rates_are_chosen_on_validation_rows_and_the_test_rows_are_met_with_the_chosen_one_alone(runs, rows):
    study(TASK, PLAN, rows, runs.train, runs.cost)
    for name in PLAN.methods:
        rate, inside = chosen_rate(TASK, METHODS[name], PLAN, rows, runs.train)
        assert (rate, inside) == (1e-3, True)
        tested = [s for s in final_runs(runs) if s["method"]["name"] == name]
        budgets = ["steps"] if name == "full" else ["steps", "seconds"]
        assert sorted((s["budget"], s["seed"]) for s in tested) == sorted((b, s) for b in budgets for s in PLAN.seeds)
        assert {s["rate"] for s in tested} == {rate}
    first_test = next(i for i, s in enumerate(runs.made) if s.get("part") == "test")
    assert all(s.get("part") != "validation" for s in runs.made[first_test:])


def test_equal_seconds_are_as_many_steps_as_fit_the_time_of_full_fine_tuning(runs, rows):
    study(TASK, PLAN, rows, runs.train, runs.cost)
    steps = {s["method"]["name"]: s["steps"] for s in final_runs(runs, budget="seconds")}
    assert steps == {"hift_m1": 80, "lora_r8": 50}
    assert {s["steps"] for s in final_runs(runs, budget="steps")} == {40}


def test_all_methods_of_a_seed_are_run_before_the_next_seed(runs, rows):
    study(TASK, PLAN, rows, runs.train, runs.cost)
    assert [s["method"]["name"] for s in final_runs(runs, budget="steps")] == 2 * list(PLAN.methods)


def test_more_seeds_run_nothing_again(runs, rows):
    study(TASK, PLAN, rows, runs.train, runs.cost)
    more = FakeRuns()
    study(TASK, replace(PLAN, seeds=(0, 1, 2)), rows, more.train, more.cost)
    assert len(more.made) == 5 and {settings["seed"] for settings in more.made} == {2}


def test_without_fresh_parameters_no_head_takes_turns_and_the_untrained_model_is_tested(runs, rows):
    plan = replace(PLAN, methods=("full", "hift_m1", "hift_m1_classifier", "hift_m1_head_in_turn"))
    study(replace(TASK, fresh_head=False), plan, rows, runs.train, runs.cost)
    assert {s["method"]["name"] for s in runs.made} == {"full", "hift_m1", UNTRAINED}
    assert [s["steps"] for s in runs.made if s["method"]["name"] == UNTRAINED] == [0]


def test_a_plan_that_would_fail_after_hours_is_refused_before(monkeypatch):
    with pytest.raises(ValueError, match="add full to --methods"):
        Plan(("hift_m1",)).check()
    monkeypatch.setattr(quality_plan, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="lora_r16: needs peft; pip install peft"):
        Plan(("full", "lora_r16")).check()
    Plan(("full", "hift_m1")).check()


# report


def test_the_table_has_mean_spread_and_seeds_of_each_method_and_marks_a_rate_at_the_edge(runs, rows, tmp_path):
    study(TASK, replace(PLAN, num_extensions=0), rows, runs.train, runs.cost)  # LoRA's grid begins at 1e-3
    table, picture = write_report(rows.all, tmp_path)
    text = table.read_text()
    assert text.count("\n## ") == 2 and "at equal steps" in text and "at equal seconds" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    table_of = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:5]}
    assert table_of["full fine-tuning"]["accuracy, %"] == "80.5 ± 0.7"
    assert table_of["full fine-tuning"]["lowest to highest"] == "80.0 to 81.0"
    assert table_of["full fine-tuning"]["peak MiB"] == "1.0"
    assert table_of["HiFT, m = 1"]["rate"] == "0.001" and table_of["HiFT, m = 1"]["speed"] == "2.00"
    assert table_of["LoRA, r = 8"]["rate"] == "0.001 (edge of the grid)"
    assert "loss on other text" not in text  # no run has any
    assert imread(picture).std() > 0.05


def test_a_diverged_run_stays_in_table_and_picture(runs, rows, tmp_path):
    study(TASK, replace(PLAN, seeds=(0,), methods=("full", "hift_m1")), rows, runs.train, runs.cost)
    for row in rows.all:
        if row["settings"].get("part") == "test" and row["settings"]["method"]["name"] == "hift_m1":
            row["metrics"]["loss"] = None
    table, _ = write_report([{**row, "settings": {**row["settings"], "task": "gsm8k"}} for row in rows.all], tmp_path)
    assert "| HiFT, m = 1 |" in table.read_text() and "| inf |" in table.read_text()


def test_groups_come_in_the_order_of_tasks_budgets_and_methods_whatever_the_rows_do(runs, rows):
    study(TASK, PLAN, rows, runs.train, runs.cost)
    names = [(group.budget, group.method) for group in groups_of(reversed(rows.all))]
    assert names == [("steps", name) for name in PLAN.methods] + [("seconds", name) for name in PLAN.methods[1:]]
    assert all(len(group.runs) == 2 for group in groups_of(rows.all))


def test_a_report_of_nothing_says_what_to_do(rows, tmp_path):
    with pytest.raises(ValueError, match="no test run yet; run without --report first"):
        write_report(rows.all, tmp_path)
