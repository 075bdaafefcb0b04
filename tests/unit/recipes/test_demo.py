"""The table at the end of `make demo`: its figures are those of the two summaries, in 80 columns."""

import json

import pytest

from hift_ds.recipes import demo

CONFIG = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}


def summary(replies: list[str], **changes) -> dict:
    answers = [
        {"question": f"q{i}?", "answer": "yes", "reply": reply, "right": reply == "yes"}
        for i, reply in enumerate(replies)
    ]
    before = [{**one, "reply": "eh", "right": False} for one in answers]
    return {
        "model": "smollm2-135m", "dataset": "hift-facts", "steps": 10, "ranks": 2, "config": CONFIG,
        "held_out_loss": [4.0, 0.5], "training_seconds": 60.0, "measured_peak": 3 << 30,
        "forecast_on_a_card": {"hift": 1 << 30, "full": 4 << 30, "host": 0},
        "answers": {"before": before, "after": answers}, **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    runs = {
        "hift": summary(["yes", "yes", "no\nway"], held_out_loss=[4.0, 0.625], training_seconds=30.0),
        "full": summary(["no", "yes", "yes"], measured_peak=4 << 30),
    }
    for name, run in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(run))
    return tmp_path


def cells(text: str, label: str) -> list[str]:
    (line,) = (line.strip() for line in text.splitlines() if line.strip().startswith(label))
    return [cell.strip() for cell in line.removeprefix(label).split("  ") if cell.strip()]


def test_table_says_what_the_two_runs_say(folder, capsys):
    assert demo.main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert "smollm2-135m on hift-facts: 40 examples, 2 ranks" in text
    assert cells(text, "held-out loss") == ["4.00 -> 0.62", "4.00 -> 0.50"]
    assert cells(text, "held-out questions answered right") == ["2 of 3", "2 of 3"]
    assert cells(text, "seconds of training") == ["30 (-50 %)", "60"]
    assert cells(text, "peak memory of a rank, MiB: measured here") == ["3,072 (-25 %)", "4,096"]
    assert cells(text, "forecast for GPUs") == ["1,024 (-75 %)", "4,096"]
    for line in (
        "First that HiFT answers right: q0?",
        "right answer: yes",
        "HiFT: yes",
        "full: no",
        "First that HiFT answers wrong: q2?",
        "HiFT: no way",
        "full: yes",
    ):
        assert line in [shown.strip() for shown in text.splitlines()]


def test_no_line_is_over_80_columns_and_the_file_has_both_runs_and_what_was_shown(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    demo.main(["."])
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, shown)) <= 80
    found = json.loads((folder / "summary.json").read_text())
    assert found["shown"] == shown
    assert found["hift"] == json.loads((folder / "hift" / "summary.json").read_text())
    assert found["full"] == json.loads((folder / "full" / "summary.json").read_text())


def test_runs_of_unlike_numbers_of_examples_are_not_compared(folder):
    (folder / "full" / "summary.json").write_text(json.dumps(summary(["yes"], steps=11)))
    with pytest.raises(ValueError, match="40 examples beside 44"):
        demo.main([str(folder)])
