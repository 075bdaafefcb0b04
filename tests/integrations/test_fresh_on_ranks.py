"""A fresh head trains at every step at every ZeRO stage, the body in its turns; a run that resumes finds the same."""

from __future__ import annotations

import json
import re

import pytest
import torch
from deepspeed import comm as dist
from hift_testing.messages import logged
from hift_testing.selection import slow
from hift_testing.trainers import arguments, assert_equal, auto_config, forget, losses_of, rows, trainer_of
from hift_testing.training import ds_config, whole_weights
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertForSequenceClassification

import hift_ds

pytestmark = pytest.mark.multi_rank
HEAD = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=96, **QUIET
    )).save_pretrained(folder)  # fmt: skip
    return folder


def classifier(folder):
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


def batch(step):
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    ids = torch.randint(3, 96, (4, 8), generator=generator)
    return {"input_ids": ids, "labels": ids.sum(1) % 3}


def assert_head_at_each_step(folder, stage, rate):
    forget()
    model = classifier(folder)
    optimizer, config = None, ds_config(stage, hift={})
    if rate is not None:
        del config["optimizer"]
        named = dict(model.named_parameters())
        body = [param for name, param in named.items() if name not in HEAD]
        groups = [{"params": body, "lr": 1e-4}, {"params": [named[name] for name in sorted(HEAD)], "lr": rate}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4)
    engine = hift_ds.initialize(model=model, config=config, optimizer=optimizer)[0]
    assert set(engine.block_plan.always_active) == HEAD
    assert "trained at every step: 4 parameter tensors" in engine.hift.summary()
    before, blocks = whole_weights(engine), engine.hift.blocks
    for step in range(len(blocks)):
        engine.backward(engine(**batch(step)).loss)
        engine.step()
        after = whole_weights(engine)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved & HEAD == HEAD
        assert moved - HEAD <= set(blocks[step].fqns) and moved - HEAD
        if rate is not None:  # of Adam's first steps, the largest
            assert (after["classifier.weight"] - before["classifier.weight"]).abs().max() > 10 * 1e-4
            assert max((after[name] - before[name]).abs().max() for name in moved - HEAD) < 2e-4
        before = after
    engine.destroy()


@pytest.mark.parametrize(("stage", "rate"), [(3, 1e-2), *map(slow, (0, 0, 2, 2, 3), (None, 1e-2, None, 1e-2, None))])
def test_the_fresh_head_moves_at_each_step_and_the_body_in_turn(two_ranks, bert, stage, rate):
    two_ranks.run(assert_head_at_each_step, bert, stage, rate)


def assert_rank_0_decides(folder):
    """Rank 0 has loaded the model, the other has made it and gets the weights."""
    model = classifier(folder) if dist.get_rank() == 0 else BertForSequenceClassification(classifier(folder).config)
    told = ds_config(2, hift={"always_active": [r"layer\.2\.output\.LayerNorm", "fresh"]})
    engine = hift_ds.initialize(model=model, config=told)[0]
    norm = {f"bert.encoder.layer.2.output.LayerNorm.{name}" for name in ("weight", "bias")}
    assert set(engine.block_plan.always_active) == HEAD | norm
    engine.destroy()


def test_what_rank_0_has_loaded_decides_for_all_ranks_beside_what_the_config_names(two_ranks, bert):
    two_ranks.run(assert_rank_0_decides, bert)


def assert_resumes(base, folder, stage):
    def train(where, resume=None):
        forget()
        args = arguments(folder / where, auto_config(stage), 6, save_strategy="steps", save_steps=3)
        trainer = trainer_of(classifier(base), args, rows(24, classes=3))
        trainer.train(resume_from_checkpoint=resume)
        engine = trainer.model_wrapped
        assert set(engine.block_plan.always_active) == HEAD
        weights = whole_weights(engine)
        engine.destroy()
        return losses_of(trainer), weights

    with hift_ds.enable():
        losses, weights = train("whole")
        again, same = train("again", str(folder / "whole" / "checkpoint-3"))
    assert again == losses
    assert_equal(same, weights)


@pytest.mark.parametrize("stage", [2, slow(0), slow(3)])
def test_a_resumed_trainer_finds_the_same_fresh_head(one_rank, bert, tmp_path, stage):
    one_rank.run(assert_resumes, bert, tmp_path, stage)


def assert_found_in_partitioned(folder):
    forget()
    args = arguments(folder / "out", auto_config(3), 2)  # from_pretrained partitions from here on
    model = classifier(folder)
    with hift_ds.enable():
        trainer = trainer_of(model, args, rows(24, classes=3))
        trainer.train()
    assert set(trainer.model_wrapped.block_plan.always_active) == HEAD
    trainer.model_wrapped.destroy()


def test_a_fresh_head_is_found_in_a_model_that_from_pretrained_has_partitioned(one_rank, bert):
    one_rank.run(assert_found_in_partitioned, bert)


def assert_other_plan_noted(base, folder):
    forget()
    engine = hift_ds.initialize(model=classifier(base), config=ds_config(0, hift={}))[0]
    engine.save_checkpoint(str(folder), tag="here")
    engine.module.save_pretrained(folder / "trained")
    engine.destroy()
    again = hift_ds.initialize(model=classifier(folder / "trained"), config=ds_config(0, hift={}))[0]
    assert again.block_plan.always_active == ()
    with logged("hift_ds.engine_loading") as notes:
        again.load_checkpoint(str(folder), tag="here")
    assert "and are none now" in notes[0] and "a cycle begins" in notes[-1]
    advised = json.loads(re.search(r'"always_active": (\[.*?\])', notes[0])[1])
    assert advised == ["module:bert.pooler", "module:classifier"]
    again.destroy()
    told = ds_config(0, hift={"always_active": advised})
    again = hift_ds.initialize(model=classifier(folder / "trained"), config=told)[0]
    with logged("hift_ds.engine_loading") as notes:
        assert again.load_checkpoint(str(folder), tag="here")[0] is not None
    assert notes == []
    again.destroy()


def test_where_the_trained_model_is_loaded_a_note_says_how_to_name_its_head(one_rank, bert, tmp_path):
    one_rank.run(assert_other_plan_noted, bert, tmp_path)
