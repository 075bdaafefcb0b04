"""What the benchmark scripts measure: whole cycles, without holding up what overlaps; the forecast of the very run."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from hift_ds.recipes import benchmark, training
from hift_ds.recipes.results import join_rounds, step_times


class Engine:
    """Counts steps; its loss is the number of the step."""

    device = torch.device("cpu")
    steps = 0

    def __call__(self, **batch):
        return SimpleNamespace(loss=torch.tensor(float(self.steps)))

    def backward(self, loss):
        pass

    def step(self):
        self.steps += 1

    def get_lr(self):
        return [1e-3]

    def gradient_accumulation_steps(self):
        return 1


@pytest.fixture
def train(monkeypatch):
    """`_train` by a clock that a step advances by its number; waits are noted by the step before which they come."""
    engine, waits, shown = Engine(), [], []
    ranks = SimpleNamespace(all_reduce=lambda tensor: tensor.mul_(2), get_world_size=lambda: 2)
    for module in (benchmark, training):
        monkeypatch.setattr(module, "dist", ranks)
    monkeypatch.setattr(benchmark, "_wait", lambda engine: waits.append(engine.steps))
    clock = SimpleNamespace(perf_counter=lambda: engine.steps * (engine.steps - 1) / 2)
    monkeypatch.setattr(benchmark, "time", clock)
    progress = SimpleNamespace(update=lambda *values: shown.append(values))

    def run(steps, cycle):
        stream = itertools.repeat({"input_ids": torch.zeros(1, 6), "labels": torch.zeros(1, 6)})
        found = benchmark._train(engine, stream, steps, cycle, progress, 6)
        return *found, waits, shown

    return run


def test_time_is_that_of_whole_cycles_and_the_host_waits_once_in_each(train):
    losses, seconds, waits, shown = train(8, 3)
    assert losses == [0, 1, 2, 3, 4, 5, 6, 7]
    assert seconds == [1, 4]  # (0 + 1 + 2) / 3, (3 + 4 + 5) / 3; the last two steps are no cycle
    assert waits == [0, 3, 6, 8]
    assert [values[0] for values in shown] == losses and shown[0][3] == 6 / 1


def test_without_a_whole_cycle_there_is_no_time(train):
    losses, seconds, _, _ = train(2, 3)
    assert (losses, seconds) == ([0, 1], [])
    assert step_times(seconds, 3, 6)["step_ms"] is None


def test_times_of_a_row_are_quantiles_over_cycles_and_tokens_by_the_mean():
    row = step_times([0.5, 0.1, 0.2, 0.3, 0.4], 3, 6)
    assert row["step_ms"] == {"p20": 180.0, "p50": 300.0, "p80": 420.0}
    assert (row["timed_cycles"], row["timed_steps"]) == (5, 15)
    assert row["tokens_per_s"] == pytest.approx(6 / 0.3)


def test_rounds_are_joined_over_all_their_cycles_and_failed_ones_count_only_if_all_failed():
    first, second = ({"status": "ok", "loss": [each], **step_times(each, 3, 6)} for each in ([0.1, 0.2], [0.3, 0.4]))
    joined = join_rounds([first, {"status": "out of memory"}, second])
    assert joined == {"status": "ok", "rounds": 2, "loss": [[0.1, 0.2]], **step_times([0.1, 0.2, 0.3, 0.4], 3, 6)}
    assert join_rounds([first]) == {**first, "rounds": 1}
    assert join_rounds([{"status": "refused: no"}]) == {"status": "refused: no", "rounds": 1}
    untimed = {"status": "ok", **step_times([], 3, 6)}
    assert join_rounds([untimed, untimed])["step_ms"] is None


def test_a_wait_on_cuda_is_for_the_current_stream_alone(monkeypatch):
    """The copies of state have streams of their own."""
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append("device"))
    benchmark._wait(SimpleNamespace(device=torch.device("cuda")))
    assert waited == ["stream"]
