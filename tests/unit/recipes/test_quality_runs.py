"""The runs of the comparison of quality, with a tiny random BERT and rows of a few words."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hift_testing.selection import slow

import hift_ds
from hift_ds.recipes import quality_runs, training
from hift_ds.recipes.quality import cost_settings, settings_of
from hift_ds.recipes.quality_plan import METHODS, TASKS
from hift_ds.recipes.quality_tasks import in_groups, load_task, split, sums_of

WORDS = ("card", "top", "up", "lost", "my", "where", "is", "money", "fee", "why")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    hift_ds.init_distributed()  # as launch/quality.py does; DeepSpeed's own would compile an operator first
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_bert")
    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(**sizes, num_hidden_layers=6, num_attention_heads=2)
    ).bert.save_pretrained(folder)  # as the sample: no head in the checkpoint
    return replace(TASKS["banking77"], model=str(folder), steps=8, micro_batch=4, num_validation=10, num_test=6)


@pytest.fixture(scope="module")
def data(task, tmp_path_factory):
    return load_task(task, data_folder(tmp_path_factory.mktemp("data")))


def data_folder(folder):
    for part, count in (("train", 50), ("test", 20)):
        lines = [f"{WORDS[i % 10]} {part} {' '.join(WORDS[: i % 7])},label{i % 3}" for i in range(count)]
        (folder / f"banking77_{part}.csv").write_text("\n".join(["text,category", *lines]) + "\n")
    return folder


def weights(engine):
    return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


# data


@pytest.mark.parametrize(("count", "held_out"), [(50, 10), (7, 0), (5, 9)])
def test_held_out_rows_are_apart_from_the_others_and_the_same_each_time(count, held_out):
    kept, out = split(range(count), held_out)
    assert sorted(kept + out) == list(range(count))
    assert len(out) == min(held_out, count)
    assert (kept, out) == split(range(count), held_out)


def test_validation_rows_come_from_the_training_file_and_test_rows_from_the_other(data):
    assert (len(data.train), len(data.validation), len(data.test), data.num_labels) == (40, 10, 6, 3)


def test_a_micro_batch_has_rows_of_like_length_and_each_row_is_in_one(data):
    groups = in_groups(data, 4, seed=1, pool=5).train
    assert len(groups) == 10 and all(len(group) == 4 for group in groups)
    assert len({id(row) for group in groups for row in group}) == 40
    spread = [max(map(length, group)) - min(map(length, group)) for group in groups]
    assert sum(spread) / len(spread) <= 1.5  # of lengths from 2 to 8
    other = in_groups(data, 4, seed=2, pool=5).train
    assert [id(row) for row in groups[0]] != [id(row) for row in other[0]]


def length(row):
    return len(row["input_ids"])


def test_a_batch_is_padded_with_mask_0(data):
    rows = sorted(data.train, key=length)
    batch = data.collate([rows[0], rows[-1]])
    short, long = length(rows[0]), length(rows[-1])
    assert batch["attention_mask"].tolist() == [[1] * short + [0] * (long - short), [1] * long]
    assert batch["labels"].shape == (2,)


def test_missing_files_are_named(task, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"banking77 needs banking77_train\.csv, banking77_test\.csv there"):
        load_task(task, tmp_path)


def test_a_row_without_a_label_is_named(task, tmp_path):
    for name in ("sst2_train.tsv", "sst2_test.tsv"):
        (tmp_path / name).write_text("where is my card\t1\nlost\n")
    with pytest.raises(ValueError, match=r"sst2_train\.tsv, line 2: has 1 cells"):
        load_task(replace(TASKS["sst2"], model=task.model), tmp_path)


def test_loss_and_right_answers_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    loss, right, count = sums_of(logits, torch.tensor([0, 1]))
    assert loss == pytest.approx(-torch.log(torch.tensor(0.5 * 0.2)).item()) and (right, count) == (1, 2)
    # Tokens: position i answers for i + 1; the first label and the ignored one have no part.
    tokens = torch.stack([logits, logits])[:, [0, 1, 0]]
    loss, right, count = sums_of(tokens, torch.tensor([[2, 0, 2], [2, -100, 1]]))
    assert loss == pytest.approx(-torch.log(torch.tensor(0.5 * 0.7 * 0.2)).item(), rel=1e-5)
    assert (right, count) == (2, 3)


# runs


@pytest.mark.parametrize("name", [m if m in ("full", "hift_m2", "lora_r8", "last_layer") else slow(m) for m in METHODS])
def test_a_cycle_of_a_contestant_moves_what_it_trains_and_nothing_else(task, data, name):
    if METHODS[name].kind == "lora":
        pytest.importorskip("peft", reason="LoRA is peft's")
    engine = quality_runs._engine(task, data, METHODS[name], 1e-2, 16, seed=0)
    stream = quality_runs._stream(task, data, 0, engine.device)
    before = weights(engine)
    engine.train()
    for _ in range(9):  # without blocks the first step's rate is 0
        training.optimizer_step(engine, stream)
    moved = {fqn for fqn, weight in weights(engine).items() if not torch.equal(weight, before[fqn])}
    wanted = {
        "full": lambda fqn: True, "hift": lambda fqn: True,
        "lora": lambda fqn: "lora_" in fqn or "modules_to_save" in fqn,
        "last": lambda fqn: "layer.5." in fqn or "pooler" in fqn or "classifier" in fqn,
    }[METHODS[name].kind]  # fmt: skip
    # A key's bias moves the loss by rounding alone; the row of types that no batch names has no gradient.
    certain = {fqn for fqn in before if wanted(fqn) and "key.bias" not in fqn}
    assert certain <= moved <= {fqn for fqn in before if wanted(fqn)}


def test_what_is_always_active_moves_at_each_step_and_what_takes_turns_once_a_cycle(task, data):
    moves = {}
    for name in ("hift_m1", "hift_m1_classifier", "hift_m1_head_in_turn"):
        engine = quality_runs._engine(task, data, METHODS[name], 1e-2, 16, seed=0)
        stream = quality_runs._stream(task, data, 0, engine.device)
        engine.train()
        moves[name] = [0, 0]
        for _ in range(8):
            before = weights(engine)
            training.optimizer_step(engine, stream)
            after = weights(engine)
            for place, fqn in enumerate(("classifier.weight", "bert.pooler.dense.weight")):
                moves[name][place] += not torch.equal(after[fqn], before[fqn])
    assert moves == {"hift_m1": [8, 8], "hift_m1_classifier": [8, 1], "hift_m1_head_in_turn": [1, 1]}


def test_a_run_is_the_same_again_and_another_with_another_seed(task, data):
    def run(seed):
        settings = settings_of(task, METHODS["hift_m1"], "validation", "steps", 8, 1e-2, seed)
        found = quality_runs.train(task, data, settings)
        json.dumps(found, allow_nan=False)
        return found["metrics"]["loss"], found["training_loss"]

    assert run(0) == run(0) != run(1)


def test_a_run_evaluates_the_part_that_its_settings_name_and_no_other(task, data):
    for part, count in (("validation", 10), ("test", 6)):
        settings = settings_of(task, METHODS["full"], part, "steps", 2, 1e-3, 0)
        found = quality_runs.train(task, replace(data, **{_other(part): None}), settings)
        assert found["metrics"]["count"] == count
        assert found["trained_parameters"] == sum(p.numel() for p in _network(task, data).parameters())


def _other(part):
    return "test" if part == "validation" else "validation"


def _network(task, data):
    return quality_runs.load_network(task, data.num_labels)


@pytest.mark.slow
def test_the_last_layer_alone_has_the_smallest_peak_and_full_fine_tuning_the_most_gradients(task, data):
    peaks = {
        name: quality_runs.cost(task, data, cost_settings(task, METHODS[name]))["peak"]
        for name in ("full", "hift_m1", "last_layer")
    }
    assert peaks["last_layer"]["allocated"] == min(peak["allocated"] for peak in peaks.values())
    assert peaks["full"]["gradients"] == max(peak["gradients"] for peak in peaks.values())


def test_speed_is_that_beside_full_fine_tuning_over_whole_cycles(task, data, monkeypatch):
    calls = []
    real = training.optimizer_step

    def slow(engine, stream):
        calls.append(hasattr(engine, "hift"))
        time.process_time.now += 2.0 if calls[-1] else 3.0
        return real(engine, stream)

    monkeypatch.setattr(training, "optimizer_step", slow)
    monkeypatch.setattr(quality_runs.time, "process_time", Clock())
    found = quality_runs.cost(task, data, cost_settings(task, METHODS["hift_m2"]))
    assert found["speed"] == pytest.approx(1.5) and found["timed_steps"] == 8
    assert calls[:32] == 2 * (8 * [False] + 8 * [True])
    assert quality_runs.cost(task, data, cost_settings(task, METHODS["full"]))["speed"] == 1.0


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.slow
def test_the_script_says_in_one_sentence_what_is_wrong_with_its_data(tmp_path):
    script = [sys.executable, str(ROOT / "launch/quality.py"), "--data", str(tmp_path), "--methods", "full"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_PORT")}
    done = subprocess.run(
        [*script, "--output_dir", str(tmp_path)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 2
    assert f"quality.py: error: --data {str(tmp_path)!r}: banking77 needs" in done.stderr
