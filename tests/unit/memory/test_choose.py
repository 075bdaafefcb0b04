"""The largest number of layers that fits, against a brute force over all numbers."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn

from hift_ds.memory import choose
from hift_ds.memory.choose import ASSUMED_SEQ_LEN, choose_layers_per_block
from hift_ds.memory.planner import Planner
from hift_ds.memory.request import RESERVE_BYTES, Request
from hift_ds.recipes.comparison import Cell, config_of

UNITS = 5  # three layers, the embedding, the head
CONFIG = hf.LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def ds_config(**hift):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "hift": {"enabled": True, "layers_per_block": None, "seq_len": 16, **hift},
    }


class Forecasts:
    """One planner for all cases, and what each number of layers needs by the whole plan, every block of it."""

    def __init__(self):
        self.planner = Planner(copy.deepcopy(CONFIG))
        self.needs = {}
        for device in ("cuda", "cpu"):  # in whose one memory all state stays
            request = Request(ds_config(), 16, "sdpa", gpus=2, device_type=device)
            self.needs[device] = {}
            for number in range(1, UNITS + 1):
                asked = request.changed("hift", "layers_per_block", value=number)
                layout = self.planner.layout(asked)
                peaks = [self.planner.figures(asked, layout, i).peak for i in range(len(layout.block_plan.blocks))]
                self.needs[device][number] = max(peaks) + (RESERVE_BYTES if device == "cuda" else 0)

    def largest(self, memory, device):
        return max((n for n, need in self.needs[device].items() if need <= memory), default=None)


@pytest.fixture(scope="module")
def forecasts():
    return Forecasts()


@pytest.fixture
def planned(forecasts, monkeypatch):
    """Every call plans with the traces that are there already."""
    monkeypatch.setattr(choose, "Planner", SimpleNamespace(of=lambda *_: forecasts.planner))
    return forecasts


def llama():
    with torch.device("meta"):
        return hf.LlamaForCausalLM._from_config(copy.deepcopy(CONFIG), attn_implementation="sdpa")


def test_more_layers_in_a_block_need_more(forecasts):
    needs = list(forecasts.needs["cuda"].values())
    assert needs == sorted(needs) and len(set(needs)) == UNITS


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_choice_is_the_largest_number_that_fits(planned, device):
    module, needs = llama(), planned.needs[device]
    limits = [*needs.values(), max(needs.values()) + 10**6] + [need - 1 for n, need in needs.items() if n > 2]
    for memory in limits:
        if planned.largest(memory, device) is None:
            continue
        choice = choose_layers_per_block(module, ds_config(), 2, memory, device)
        assert choice.layers_per_block == planned.largest(memory, device), (memory, needs)
        assert not choice.warning
        assert f"{choice.layers_per_block}, which needs" in choice.note
        assert "2 x 16 tokens" in choice.note


def test_a_model_too_large_gives_1_with_a_warning(planned):
    choice = choose_layers_per_block(llama(), ds_config(), 2, planned.needs["cuda"][1] - 1, "cuda")
    assert (choice.layers_per_block, choice.warning) == (1, True)
    assert "even that needs 1.0 GiB of 1.0 GiB at 2 x 16 tokens" in choice.note
    assert "hift-ds plan" in choice.note


def test_a_plain_module_gives_1_with_a_warning():
    choice = choose_layers_per_block(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ds_config(), 1, 10**12, "cuda")
    assert (choice.layers_per_block, choice.warning) == (1, True)
    assert "Sequential is no transformers model" in choice.note


def test_a_model_whose_code_fails_on_fake_tensors_gives_1_with_a_warning(monkeypatch):
    def broken(self, **batch):
        raise ZeroDivisionError("somebody's code")

    module = llama()
    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", broken)
    choice = choose_layers_per_block(module, ds_config(), 1, 10**12, "cuda")
    assert (choice.layers_per_block, choice.warning) == (1, True)
    assert "cannot be traced (somebody's code)" in choice.note


def test_what_the_model_is_set_to_is_what_is_planned(monkeypatch):
    seen = {}

    def largest(planner, request, memory):
        seen.update(planner=planner, request=request)
        raise ValueError("enough")

    monkeypatch.setattr(choose, "largest_blocks", largest)
    module = llama()
    module.gradient_checkpointing_enable({"use_reentrant": False})
    module.model.embed_tokens.requires_grad_(False)
    choose_layers_per_block(module, ds_config(seq_len=None), 4, 1, "cuda")
    request, planner = seen["request"], seen["planner"]
    assert (request.seq, request.gpus, request.checkpointing) == (64, 4, True), "as many tokens as positions"
    assert request.attn_implementation == "sdpa"
    assert planner._frozen == {"model.embed_tokens.weight"}
    assert planner.config is not module.config, "planning leaves the model's own config alone"
    assert module.config.use_cache is True


@pytest.mark.parametrize(("positions", "seq"), [(64, 64), (10**6, ASSUMED_SEQ_LEN), (None, ASSUMED_SEQ_LEN)])
def test_rows_are_as_long_as_the_positions_but_no_longer_than_assumed(positions, seq):
    config = type("Config", (), {"max_position_embeddings": positions})()
    assert choose._sequence(ds_config(seq_len=None), config) == seq
    assert choose._sequence(ds_config(seq_len=7), config) == 7


def test_a_client_optimizer_counts_as_what_it_keeps(monkeypatch):
    seen = []
    monkeypatch.setattr(choose, "largest_blocks", lambda planner, request, memory: seen.append(request.config))
    params = [nn.Parameter(torch.ones(1))]
    for optimizer, slots in (
        (torch.optim.SGD(params, momentum=0.5), ("momentum_buffer",)),
        (torch.optim.SGD(params), ()),
        (torch.optim.AdamW(params), ("exp_avg", "exp_avg_sq")),
        (torch.optim.AdamW, ("exp_avg", "exp_avg_sq")),  # a function that is yet to make one
    ):
        config = {key: value for key, value in ds_config().items() if key != "optimizer"}
        choose_layers_per_block(llama(), config, 1, 10**12, "cuda", None, optimizer)
        config = seen.pop()
        assert config.rule.slots(config.group) == slots


@pytest.mark.parametrize(("old", "stage"), [(True, 1), (False, 0), (None, 0), ({"stage": 3}, 3)])
def test_deepspeeds_old_way_to_write_stage_1_is_understood(old, stage):
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD"}, "hift": {"enabled": True}}
    if old is not None:
        config["zero_optimization"] = old
    assert Request(config, 8).config.stage == stage
    assert Request(config, 8).changed("zero_optimization", "stage", value=2).config.stage == 2
    cell = Cell("hift", 2, "bf16", 1, "AdamW", False, 64, 1, "bottom2up", 1)
    assert config_of(cell, config)["zero_optimization"]["stage"] == 2
