"""What the benchmark scripts measure: whole cycles, without holding up what overlaps; the forecast of the very run."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hift_ds.recipes import benchmark
from hift_ds.recipes.planning import complete_config


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
    monkeypatch.setattr(benchmark, "dist", ranks)
    monkeypatch.setattr(benchmark, "_wait", lambda engine: waits.append(engine.steps))
    clock = SimpleNamespace(perf_counter=lambda: engine.steps * (engine.steps - 1) / 2)
    monkeypatch.setattr(benchmark, "time", clock)
    progress = SimpleNamespace(update=lambda *values: shown.append(values))

    def run(steps, cycle):
        found = benchmark._train(engine, iter(lambda: {}, None), steps, cycle, progress, 6)
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
    assert benchmark._quantiles(seconds) is None


def test_a_wait_on_cuda_is_for_the_current_stream_alone(monkeypatch):
    """The copies of state have streams of their own."""
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append("device"))
    benchmark._wait(SimpleNamespace(device=torch.device("cuda")))
    assert waited == ["stream"]


def forecast_of(state, monkeypatch):
    """The plan of a run on one CPU rank with a "state" section."""
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4)  # fmt: skip
    monkeypatch.setattr(benchmark, "dist", SimpleNamespace(get_world_size=lambda: 1))
    ds_config = complete_config({"hift": {"state": state}, "bf16": {"enabled": True}}, None, 0, 1, 1)
    args = SimpleNamespace(hift=True, seq_len=8, gradient_checkpointing=False, gpu_memory_limit=None)
    engine = SimpleNamespace(device=torch.device("cpu"), hift_config=SimpleNamespace(layers_per_block=1))
    run = SimpleNamespace(model=LlamaForCausalLM(config), ds_config=ds_config)
    plan = benchmark._forecast(args, run, engine, padded=False)
    assert not isinstance(plan, str), plan
    return plan.worst


def test_on_a_cpu_the_forecast_keeps_the_form_of_the_state_and_forgets_the_ring(monkeypatch):
    fp32 = forecast_of({"ring_bytes": 1 << 20}, monkeypatch).state
    small = forecast_of({"master": "split16", "moments": "int8", "ring_bytes": 1 << 20}, monkeypatch).state
    assert fp32 == forecast_of({}, monkeypatch).state
    assert 4 / 12 <= small / fp32 <= 4.1 / 12


@pytest.mark.parametrize(
    ("limit", "device", "wanted"), [("22GiB", "cuda", 22 << 30), (None, "cuda", 80), (None, "cpu", None)]
)
def test_the_forecast_is_of_the_capped_card_or_of_the_whole_one(monkeypatch, limit, device, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80))
    engine = SimpleNamespace(device=torch.device(device))
    assert benchmark._card_bytes(SimpleNamespace(gpu_memory_limit=limit), engine) == wanted
