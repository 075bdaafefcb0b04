"""The forecast of a script's own run: of this machine's memory, and of its card."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hift_ds.recipes import planning as module


def forecast_of(state, monkeypatch):
    """The forecast of a run on one CPU rank with a "state" section."""
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4)  # fmt: skip
    monkeypatch.setattr(module, "dist", SimpleNamespace(get_world_size=lambda: 1))
    ds_config = {"train_batch_size": 1, "optimizer": {"type": "AdamW"}, "bf16": {"enabled": True}}
    ds_config["hift"] = {"enabled": True, "state": state}
    hift = SimpleNamespace(layers_per_block=1, always_active=())
    engine = SimpleNamespace(device=torch.device("cpu"), hift_config=hift, module=LlamaForCausalLM(config))
    forecasts = module.forecasts_of_run(engine, ds_config, 8, "cpu", padded=False)
    assert not isinstance(forecasts, str), forecasts
    return forecasts[0].worst


def test_on_a_cpu_the_forecast_keeps_the_form_of_the_state_and_forgets_the_ring(monkeypatch):
    fp32 = forecast_of({"ring_bytes": 1 << 20}, monkeypatch).state
    small = forecast_of({"master": "split16", "moments": "int8", "ring_bytes": 1 << 20}, monkeypatch).state
    assert fp32 == forecast_of({}, monkeypatch).state
    assert 4 / 12 <= small / fp32 <= 4.1 / 12
