"""The cases of tests/gpu run on a CPU as far as they can, so that a GPU's first hour is not spent on typing errors."""

import pytest
import torch
from hift_testing import gpu_cases as cases
from hift_testing.ranks import RankError
from hift_testing.selection import slow

from hift_ds.config.keys import StateConfig

TURNS = [0, 1, 1, 2]


FORMS = [slow(StateConfig()), StateConfig("split16", "bf16"), slow(StateConfig("none", "int8"))]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_streamed_state_has_the_bits_of_the_same_state_streamed_again(form):
    streamed = cases.trained(form, True, TURNS, 3 * 3 * 4 * 1024 * 8)
    again = cases.trained(form, True, TURNS, 3 * 3 * 4 * 1024 * 8)
    assert all(torch.equal(a, b) for a, b in zip(streamed, again, strict=True))
    if form == StateConfig():
        assert all(torch.equal(a, b) for a, b in zip(streamed, cases.trained(form, False, TURNS), strict=True))


def test_an_engine_of_the_gpu_cases_trains(one_rank):
    (facts,) = one_rank.run(cases.engine_steps, 2, "bf16", {"kernel": "triton"}, 7, strict=False)
    assert len(facts["losses"]) == 7 and facts["pinned"] is None


def test_the_case_of_copies_behind_a_step_trains(one_rank):
    assert one_rank.run(cases.copies_out_behind_a_step, 16, 4, True) == [[None] * 4]


def test_the_forecast_that_a_gpu_checks_is_met_on_a_cpu_once_in_a_process(fresh_rank):
    llama = dict(vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                 max_position_embeddings=64)  # fmt: skip
    (found,) = fresh_rank.run(cases.peaks, 0, "bf16", True, llama, 2, 48)
    measured, forecast = found
    assert sorted(measured) == list(range(len(forecast))) == list(range(5))
    assert all(abs(forecast[block] - peak) <= 0.02 * peak for block, peak in measured.items())
    with pytest.raises(RankError, match="give each case a `fresh_rank`"):
        fresh_rank.run(cases.peaks, 0, "bf16", True, llama, 2, 48)


def test_peaks_on_cuda_are_requested_bytes_beyond_those_of_the_first_products(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"requested_bytes.all.current": 64 << 20})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cases, "DEVICE", torch.device("cuda"))
    products, ones = [], torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **options: ones(*shape, **options))
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: products.append(a.requires_grad) or mm(a, b))
    assert cases.bytes_before(torch.bfloat16) == 64 << 20
    assert products == [True]
