"""`hift_ds.enable()`: which calls of `deepspeed.initialize` it takes, and what it leaves as it was."""

from __future__ import annotations

import functools
import sys
import types
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from hift_testing.training import batch_of, ds_config, run_steps, small_llama

import hift_ds
from hift_ds import start
from hift_ds.engine import LIVING, HiFTEngine

pytestmark = pytest.mark.multi_rank


def own():
    return start.DEEPSPEED_INITIALIZE  # a global of this module would be replaced


# Without an engine: which function stands where.


def test_enable_and_disable_may_be_called_again_and_leave_deepspeed_s_own_function():
    assert deepspeed.initialize is own()
    hift_ds.enable()
    hift_ds.enable()
    assert deepspeed.initialize is not own()
    hift_ds.disable()
    assert deepspeed.initialize is own()
    hift_ds.disable()
    assert deepspeed.initialize is own()


def test_the_context_puts_back_what_was_before_also_after_an_error():
    with pytest.raises(KeyError), hift_ds.enable():
        assert deepspeed.initialize is not own()
        raise KeyError
    assert deepspeed.initialize is own()
    hift_ds.enable()
    try:
        with hift_ds.enable():
            pass
        assert deepspeed.initialize is not own(), "it was enabled before the block"
    finally:
        hift_ds.disable()


def test_a_block_may_be_entered_again_and_blocks_may_end_in_any_order():
    block = hift_ds.enable()
    for _ in range(2):
        with block:
            assert deepspeed.initialize is not own()
        assert deepspeed.initialize is own()
    first, second = hift_ds.enable(), hift_ds.enable()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert deepspeed.initialize is not own(), "the second block is open"
    second.__exit__(None, None, None)
    assert deepspeed.initialize is own()


def test_a_name_that_a_script_has_imported_before_is_replaced_too_and_put_back(monkeypatch):
    script = types.ModuleType("a_users_script")
    script.initialize = script.other_name = deepspeed.initialize
    monkeypatch.setitem(sys.modules, "a_users_script", script)
    with hift_ds.enable():
        assert script.initialize is script.other_name is deepspeed.initialize is not own()
        kept = script.initialize
    assert script.initialize is script.other_name is own()
    given = {}
    monkeypatch.setattr(start, "DEEPSPEED_INITIALIZE", lambda *args, **more: given.update(more) or "deepspeed's")
    assert kept(config={"hift": {"enabled": True}, "optimizer": {"type": "AdamW"}}) == "deepspeed's", "it has ended"


def test_trainer_s_train_is_its_own_again_after_disable_and_a_wrapper_of_somebody_else_stays(monkeypatch):
    from transformers import Trainer

    plain = Trainer.train
    monkeypatch.setattr(Trainer, "train", plain)
    with hift_ds.enable():
        assert Trainer.train is not plain
        with hift_ds.enable():
            once = Trainer.train
    assert Trainer.train is plain and once.__wrapped__ is plain, "wrapped once"
    with hift_ds.enable():
        Trainer.train = theirs = functools.wraps(Trainer.train)(lambda self: None)
    assert Trainer.train is theirs


def test_the_package_keeps_its_functions_when_its_rooms_are_imported():
    import hift_ds.enabling
    import hift_ds.integrations.trainer

    assert callable(hift_ds.enable) and callable(hift_ds.disable) and callable(hift_ds.initialize)


# With one.


def engine_from_deepspeed(config, model=None, **more):
    return deepspeed.initialize(model=small_llama() if model is None else model, config=config, **more)[0]


def assert_takes(form, folder):
    config = ds_config(2, hift={})
    if form == "guarded":
        config["optimizer"]["type"] = "HiFT_AdamW"
    with hift_ds.enable():
        if form == "args":
            path = folder / "config.json"
            path.write_text(__import__("json").dumps(config))
            engine = deepspeed.initialize(SimpleNamespace(deepspeed_config=str(path)), small_llama())[0]
        elif form == "config_params":
            engine = deepspeed.initialize(model=small_llama(), config_params=config)[0]
        elif form == "optimizer":
            del config["optimizer"]
            model = small_llama()
            engine = engine_from_deepspeed(config, model, optimizer=torch.optim.AdamW(model.parameters()))
        else:
            engine = engine_from_deepspeed(config)
    assert isinstance(engine, HiFTEngine)
    run_steps(engine, 7)
    assert engine.hift.cycle == 1
    engine.destroy()


@pytest.mark.parametrize("form", ["config", "config_params", "args", "optimizer", "guarded"])
def test_a_hift_section_is_honoured_in_whatever_way_the_config_comes(one_rank, tmp_path, form):
    one_rank.run(assert_takes, form, tmp_path)


def assert_untouched(what):
    config, model = ds_config(0, hift={} if what != "no section" else None), small_llama()
    if what == "off":
        config["hift"]["enabled"] = False
    if what == "no optimizer":
        del config["optimizer"]
    if what == "nothing to train":
        model.requires_grad_(False)
    config["optimizer"] and config["optimizer"]["params"].update(torch_adam=True) if "optimizer" in config else None
    with hift_ds.enable():
        engine = engine_from_deepspeed(config, model)
    assert type(engine) is DeepSpeedEngine and not LIVING
    assert torch.isfinite(engine(**batch_of(0, 0, 0)).loss)
    engine.destroy()


@pytest.mark.parametrize("what", ["no section", "off", "no optimizer", "nothing to train"])
def test_whatever_hift_does_not_train_stays_deepspeed_s_own(one_rank, what):
    one_rank.run(assert_untouched, what)


def assert_refusals():
    with hift_ds.enable():
        for name in ("HiFT", "Hift", "hifts", "hitf"):
            config = {**ds_config(0), name: {"enabled": True}}
            with pytest.raises(ValueError, match=f"{name}: unknown key; write it \"hift\""):
                engine_from_deepspeed(config)
        with pytest.raises(ValueError, match=r"hift.layers_per_block=0: must be 1 or more"):
            engine_from_deepspeed(ds_config(0, hift={"layers_per_block": 0}))
    guarded = ds_config(0)
    guarded["optimizer"]["type"] = "HiFT_AdamW"
    for config in (guarded, {**guarded, "hift": {"enabled": False}}):
        with pytest.raises(ValueError, match=r"optimizer.type='HiFT_AdamW': only HiFT trains with it"):
            hift_ds.initialize(model=small_llama(), config=config)
        with hift_ds.enable(), pytest.raises(ValueError, match=r"optimizer.type='HiFT_AdamW': only HiFT trains"):
            engine_from_deepspeed(config)
    assert not LIVING


def test_a_section_spelled_wrong_and_a_guarded_optimizer_without_one_are_refused(one_rank):
    one_rank.run(assert_refusals)


def assert_plain_refuses(stage, name):
    config = ds_config(stage, hift={})
    config["optimizer"]["type"] = f"HiFT_{name}"
    config["optimizer"]["params"] = {"lr": 1e-3}
    with pytest.raises(Exception, match=f"(?i)hift_{name}"):
        engine_from_deepspeed(config)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_plain_deepspeed_refuses_a_guarded_optimizer(one_rank, stage):
    for name in ("AdamW", "SGD", "Lion"):
        one_rank.run(assert_plain_refuses, stage, name)


def assert_says_so_once():
    import logging

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hift_ds").addHandler(handler)
    try:
        with hift_ds.enable():
            engine = engine_from_deepspeed(ds_config(0, hift={}))
    finally:
        logging.getLogger("hift_ds").removeHandler(handler)
    rank = deepspeed.comm.get_rank()
    (line,) = [text for text in said if text.startswith("HiFT trains")] if rank == 0 else [""]
    assert rank > 0 or ("in 6 blocks" in line and "model.layers.2" in line)
    assert rank == 0 or not any(text.startswith("HiFT trains") for text in said)
    engine.destroy()


def test_rank_0_says_once_that_hift_trains_and_shows_the_blocks(two_ranks):
    two_ranks.run(assert_says_so_once)
