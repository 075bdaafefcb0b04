"""Curves of held-out loss: which runs follow from those that are there, and the table and picture of all."""

import csv
import json
import math

import pytest
from matplotlib.image import imread

from hift_ds.recipes.curves import following, main, read_runs, step_seconds

TOKENS_PER_S = {"full": 50.0, "100": 40.0, "8": 100.0, "4": 125.0, "1": 200.0}
LAST = {"full": {"3e-5": 1.2, "1e-4": 1.0, "3e-4": math.nan}, "8": {"3e-4": 1.3, "1e-3": 1.4},
        "4": {"3e-4": 1.6, "1e-3": 1.5}, "1": {"1e-3": 1.7}}  # fmt: skip
FOLLOWING = [("100", "1e-4", 10), ("100", "1e-4", 8), ("8", "3e-4", 20), ("4", "1e-3", 25), ("1", "1e-3", 40)]


def write_run(folder, contestant, rate, steps, last):
    path = folder / "runs" / f"{contestant},{rate},{steps}" / "summary.json"
    path.parent.mkdir(parents=True)
    curve = [{"step": 5, "held_out_loss": 1.8}]
    config = {"train_micro_batch_size_per_gpu": 3}
    path.write_text(json.dumps({"held_out_loss": [2.0, last], "curve": curve, "config": config, "ranks": 2}))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "speed").mkdir()
    columns = ("status", "dtype", "method", "layers_per_block", "sequence", "micro_batch", "ranks", "accumulation",
               "tokens_per_s")  # fmt: skip
    with (tmp_path / "speed" / "results.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for name, rate in TOKENS_PER_S.items():
            method, layers = (name, "") if name == "full" else ("hift", name)
            writer.writerow(("ok", "fp32", method, layers, 50, 1, 2, 1, rate))
        writer.writerow(("ok", "bf16", "full", "", 50, 1, 2, 1, 1.0))
    for contestant, lasts in LAST.items():
        for rate, last in lasts.items():
            write_run(tmp_path, contestant, rate, 10, last)
    return tmp_path


def test_each_goes_on_at_its_best_rate_for_the_seconds_of_full_fine_tuning_and_one_block_at_that_s_rate(folder, capsys):
    seconds = step_seconds(folder)
    assert seconds["full"] == pytest.approx(2.0) and seconds["1"] == pytest.approx(0.5)
    assert following(read_runs(folder), seconds) == FOLLOWING
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [" ".join(map(str, line)) for line in FOLLOWING]


def test_table_and_picture_have_both_budgets_and_a_run_that_diverged_is_not_chosen(folder):
    for place, (contestant, rate, steps) in enumerate(FOLLOWING):
        write_run(folder, contestant, rate, steps, 1.0 - 0.1 * place)
    assert main([str(folder), "--draw"]) == 0
    lines = (folder / "results.md").read_text().splitlines()
    assert lines[0].endswith("| after 10 steps | after 20 s | steps in these |")
    assert lines[2] == "| full fine-tuning | 2.00 | 3e-5: 1.200, 1e-4: 1.000, 3e-4: diverged | 1.0000 | 1.0000 | 10 |"
    assert lines[-1] == "| HiFT, 31 blocks | 0.50 | 1e-3: 1.700 | 1.7000 | 0.6000 | 40 |"
    with (folder / "curves.csv").open() as file:
        points = [row for row in csv.DictReader(file) if (row["contestant"], row["steps"]) == ("HiFT, 4 blocks", "20")]
    assert [(row["step"], row["examples"], row["seconds"]) for row in points] == [
        ("0", "0", "0.0"), ("5", "30", "5.0"), ("20", "120", "20.0"),
    ]  # fmt: skip
    assert imread(folder / "curves.png").std() > 0.02
