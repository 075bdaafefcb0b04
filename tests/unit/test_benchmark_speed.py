"""launch/benchmark_speed.py: who trains when, with stand-ins for the engines."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from launch import benchmark_speed

BLOCKS, CYCLES = 3, 2


class Engine:
    """Notes its steps and the batch of each."""

    def __init__(self, name, device, log):
        self.name, self.device, self._log = name, SimpleNamespace(type=device), log
        self.module = SimpleNamespace(config=SimpleNamespace(vocab_size=9))
        self.hift = SimpleNamespace(blocks=[None] * BLOCKS, active_block=0)

    def __call__(self, input_ids, labels):
        self._log.append((self.name, input_ids))
        return SimpleNamespace(loss=0)

    def backward(self, loss):
        pass

    def step(self):
        self.hift.active_block = (self.hift.active_block + 1) % BLOCKS


@pytest.fixture
def measured(monkeypatch):
    """Rows, and names with batches in the order in which they trained ("wait": for the whole device)."""
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)

    def run(device):
        log = []
        monkeypatch.setattr(get_accelerator(), "synchronize", lambda: log.append(("wait", None)), raising=False)
        seed_of = lambda *_, generator: SimpleNamespace(to=lambda device: generator.initial_seed())  # noqa: E731
        monkeypatch.setattr(torch, "randint", seed_of)
        args = SimpleNamespace(cycles=CYCLES, micro_batch=1, seq_len=4)
        engines = (Engine("hift", device, log), Engine("full", device, log))
        rows = benchmark_speed.measure(args, *engines, SimpleNamespace(bytes=0))
        return rows, log

    return run


@pytest.mark.parametrize(("device", "turn"), [("cpu", 1), ("cuda", BLOCKS)])
def test_the_two_train_on_the_same_batches_in_turns_that_no_copy_of_state_outlasts(measured, device, turn):
    rows, log = measured(device)
    wanted = []
    for first in range(0, BLOCKS * (CYCLES + 1), turn):
        for name in ("hift", "full"):
            wanted.append(("wait", None))
            wanted += [(name, 1000 * step) for step in range(first, first + turn)]
    assert log == wanted
    assert [row["step"] for row in rows] == list(range(BLOCKS, BLOCKS * (CYCLES + 1)))
    assert [row["block"] for row in rows] == [0, 1, 2] * CYCLES
    assert all({"hift_s", "full_s", "hift_bytes", "full_bytes"} <= row.keys() for row in rows)
