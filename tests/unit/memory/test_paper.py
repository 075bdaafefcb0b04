"""The tables of the HiFT paper, arXiv 2401.15207: LLaMA-7B by optimizer and precision, and six models' largest unit."""

import pytest
import torch
from transformers import GPT2Config, GPTNeoConfig, LlamaConfig, RobertaConfig

from hift_ds.config.optimizers import rule_from_config
from hift_ds.memory.fake_model import FakeModel
from hift_ds.memory.paper import PRECISIONS, PaperCount, count
from hift_ds.rotation.blocks import plan_blocks

MIB, GIB = 2**20, 2**30
OPTIMIZERS = {
    "AdamW": ("AdamW", {}),
    "SGDM": ("SGD", {"momentum": 0.9}),
    "SGD": ("SGD", {}),
    "Adafactor": ("Adafactor", {}),
    "Adagrad": ("Adagrad", {}),
}
FULL, HIFT = (51410.08, 25705.04, 0, 10.82, 25705.04), (1544.06, 772.03, 0, 0.33, 772.03)
# Precision and whether by HiFT: Para, Gra and each optimizer's Sta in MiB.
TABLE = {
    ("fp32", False): (25705.04, 25705.04, FULL),
    ("mixed", False): (38557.56, 25705.04, FULL),
    ("fp32", True): (25705.04, 772.03, HIFT),
    ("mixed", True): (38557.56, 772.03, HIFT),
    ("mixed_hi", True): (13624.53, 772.03, HIFT),
}
SUMS = {  # of AdamW, in GiB
    ("fp32", False): 100.41,
    ("mixed", False): 112.96,
    ("fp32", True): 27.36,
    ("mixed_hi", True): 15.57,
}


def blocks_of(config):
    module = FakeModel(config, torch.float32).module
    params = dict(module.named_parameters())
    return [[(fqn, params[fqn].shape) for fqn in block.fqns] for block in plan_blocks(module).blocks]


def numel(block):
    return sum(shape.numel() for _, shape in block)


@pytest.fixture(scope="module")
def llama_7b():
    return blocks_of(LlamaConfig())


def assert_printed(mib, printed):
    """Within 0.1 %, or within half a unit of the last of two decimals."""
    assert abs(mib - printed) <= max(1e-3 * printed, 0.005), (mib, printed)


def test_llama_7b_has_34_units_and_6738_million_parameters(llama_7b):
    assert len(llama_7b) == 34
    assert sum(map(numel, llama_7b)) / 1e6 == pytest.approx(6738.42, abs=0.005)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("precision", "hift"), TABLE)
def test_memory_of_llama_7b_is_the_papers(llama_7b, optimizer, precision, hift):
    rule, group = rule_from_config(*OPTIMIZERS[optimizer])
    found = count(llama_7b, rule, group, precision, hift)
    para, gra, states = TABLE[precision, hift]
    sta = states[list(OPTIMIZERS).index(optimizer)]
    assert_printed(found.para / MIB, para)
    assert_printed(found.gra / MIB, gra)
    assert_printed(found.sta / MIB, sta)
    assert_printed(found.total / MIB, para + gra + sta)
    if optimizer == "AdamW" and (precision, hift) in SUMS:
        assert found.total / GIB == pytest.approx(SUMS[precision, hift], abs=0.005)


def test_every_precision_has_a_row():
    assert {precision for precision, _ in TABLE} == set(PRECISIONS)


def roberta(**size):
    return RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2, **size,
        architectures=["RobertaForSequenceClassification"],
    )  # fmt: skip


# Model: units, largest and all parameters in millions.
LARGEST = {
    "RoBERTa-base": (roberta(), 14, 39.00, 124.65),
    "RoBERTa-large": (
        roberta(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
        26, 52.00, 355.36,
    ),
    "GPT-2-large": (GPT2Config(n_embd=1280, n_layer=36, n_head=20), 37, 65.64, 774.03),
    "GPT-Neo-2.7B": (
        GPTNeoConfig(
            hidden_size=2560, num_layers=32, num_heads=20, vocab_size=50257, max_position_embeddings=2048,
            attention_types=[[["global", "local"], 16]],
        ),
        33, 133.90, 2651.31,
    ),
    "LLaMA-7B": (LlamaConfig(), 34, 202.38, 6738.42),
    "LLaMA-13B": (
        LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
        42, 317.20, 13015.86,
    ),
}  # fmt: skip


def test_largest_units_are_the_papers_and_train_89_percent_less_on_average():
    less = {}
    for name, (config, units, largest, all_of_it) in LARGEST.items():
        sizes = [numel(block) for block in blocks_of(config)]
        assert len(sizes) == units, name
        assert max(sizes) / 1e6 == pytest.approx(largest, abs=0.0051), name
        assert sum(sizes) / 1e6 == pytest.approx(all_of_it, abs=0.0051), name
        less[name] = 100 * (1 - max(sizes) / sum(sizes))
    assert sum(less.values()) / len(less) == pytest.approx(89.18, abs=0.01), less


# By hand: a small block and a large one of 10 + 5 elements.
SMALL = [("a", torch.Size((2, 2)))]
LARGE = [("b", torch.Size((2, 5))), ("c", torch.Size((5,)))]


@pytest.mark.parametrize(
    ("precision", "hift", "para"),
    [("fp32", False, 4 * 19), ("mixed", False, 6 * 19), ("fp32", True, 4 * 19), ("mixed", True, 6 * 19),
     ("mixed_hi", True, 2 * 19 + 4 * 15)],
)  # fmt: skip
def test_count_by_hand_takes_the_largest_block(precision, hift, para):
    rule, group = rule_from_config("AdamW", {})
    trained = 15 if hift else 19
    assert count([SMALL, LARGE], rule, group, precision, hift) == PaperCount(para, 4 * trained, 8 * trained)


def test_adafactor_counts_rows_and_columns_of_a_matrix_and_a_vector_whole():
    rule, group = rule_from_config("Adafactor", {})
    assert count([SMALL, LARGE], rule, group, "fp32", True).sta == 4 * (2 + 5 + 5)
    assert count([SMALL, LARGE], rule, group, "fp32", False).sta == 4 * (2 + 5 + 5 + 2 + 2)


def test_total_is_the_sum():
    assert PaperCount(1, 20, 300).total == 321


def test_an_unknown_precision_is_refused():
    rule, group = rule_from_config("AdamW", {})
    with pytest.raises(KeyError, match="fp8"):
        count([SMALL], rule, group, "fp8", True)
