"""Accelerate's own loop with `hift_ds.enable()`: bit for bit the loop with `hift_ds.initialize` on the same batches."""

from __future__ import annotations

import os

import pytest
import transformers
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import PartialState
from accelerate.utils import DummyOptim, DummyScheduler
from deepspeed import comm as dist
from hift_testing.selection import slow
from hift_testing.trainers import ADAMW, ROWS, assert_equal, auto_config, collate, decay_groups, forget, loop, rows
from hift_testing.training import small_llama, whole_weights
from torch.utils.data import DataLoader

import hift_ds
from hift_ds.engine import LIVING, HiFTEngine

pytestmark = pytest.mark.multi_rank
STEPS = 8  # of six blocks


def on_cpu_with_deepspeed():
    """As `accelerate launch` does, and Trainer does on CPU ranks, which accelerate alone takes for one."""
    forget()
    PartialState(cpu=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"


def prepared(stage, dummy, micro_steps=2):
    """Accelerator, engine, optimizer, scheduler and batches of a bare loop."""
    on_cpu_with_deepspeed()
    config = auto_config(stage, optimizer=dummy)
    del config["bf16"]  # the Accelerator says the precision
    config["gradient_clipping"] = 0.5
    plugin = DeepSpeedPlugin(hf_ds_config=config, gradient_accumulation_steps=micro_steps)
    accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=micro_steps)
    model = small_llama()
    if dummy:
        config["optimizer"]["params"] = dict(ADAMW)
        plugin.deepspeed_config["optimizer"]["params"] = dict(ADAMW)
        optimizer = DummyOptim(model.parameters())
        scheduler = DummyScheduler(
            optimizer, lr_scheduler_callable=lambda holder: transformers.get_scheduler("cosine", holder, 2, STEPS)
        )
    else:
        optimizer = decay_groups(model)
        world = dist.get_world_size()  # Accelerate steps a scheduler once for each rank
        scheduler = transformers.get_scheduler("cosine", optimizer, 2 * world, STEPS * world)
    loader = DataLoader(rows(8 * dist.get_world_size()), ROWS, collate_fn=collate)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler, loader)


def train(accelerator, engine, optimizer, scheduler, loader, steps, start=0):
    """Optimizer steps `start` to `steps` of the run, two micro steps each, weighed by tokens."""
    mine = [batch for _ in range(2 * steps) for batch in loader][2 * start : 2 * steps]
    for at in range(0, len(mine), 2):
        items = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in mine[at : at + 2])
        items = accelerator.reduce(items)
        for batch in mine[at : at + 2]:
            with accelerator.accumulate(engine):
                loss = engine(**batch, num_items_in_batch=items).loss * dist.get_world_size()
                accelerator.backward(loss * accelerator.gradient_accumulation_steps)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(engine.parameters(), 0.5)
                    assert norm is not None and norm > 0
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


def assert_loop(stage, dummy):
    with hift_ds.enable():
        parts = prepared(stage, dummy)
        accelerator, engine, _, scheduler, _ = parts
        assert isinstance(engine, HiFTEngine)
        if not dummy:
            engine.follow_schedule(scheduler)
        train(*parts, STEPS)
    assert accelerator.unwrap_model(engine) is engine.module
    weights = whole_weights(engine)
    accelerator.free_memory()
    assert not LIVING, "free_memory ends the engine"
    ours = None if dummy else decay_groups
    model = small_llama()
    expected = loop(
        model, auto_config(stage, dummy), rows(8 * dist.get_world_size()), STEPS, micro_steps=2,
        optimizer=ours and ours(model),
    )  # fmt: skip
    assert_equal(weights, expected)


@pytest.mark.parametrize(
    ("stage", "dummy"), [(2, False), *map(slow, (0, 0, 2, 3, 3), (True, False, True, True, False))]
)
def test_a_bare_loop_is_bitwise_a_loop_with_initialize(two_ranks, stage, dummy):
    two_ranks.run(assert_loop, stage, dummy)


def assert_state(folder, stage, dummy):
    with hift_ds.enable():
        parts = prepared(stage, dummy)
        train(*parts, 4)
        parts[0].save_state(str(folder))
        train(*parts, STEPS, start=4)
        weights = whole_weights(parts[1])
        parts[0].free_memory()
        again = prepared(stage, dummy)
        again[0].load_state(str(folder))
        assert again[1].hift.active_block == 4
        train(*again, STEPS, start=4)
        assert_equal(whole_weights(again[1]), weights)
        again[0].free_memory()


@pytest.mark.parametrize(
    ("stage", "dummy"), [(2, True), *map(slow, (0, 0, 2, 3, 3), (True, False, False, True, False))]
)
def test_load_state_goes_on_bitwise_where_save_state_was(two_ranks, tmp_path, stage, dummy):
    two_ranks.run(assert_state, tmp_path, stage, dummy)


def assert_auto_refused():
    """accelerate's word, not ours: null is what "hift" says for "choose for me"."""
    on_cpu_with_deepspeed()
    config = auto_config(0)
    config["hift"]["layers_per_block"] = "auto"
    with hift_ds.enable(), pytest.raises(ValueError, match="hift"):
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        accelerator = Accelerator(deepspeed_plugin=plugin)
        model = small_llama()
        accelerator.prepare(model, DummyOptim(model.parameters()), DataLoader(rows(4), ROWS, collate_fn=collate))
    assert not LIVING


def test_auto_inside_the_hift_section_is_refused_with_a_sentence(one_rank):
    one_rank.run(assert_auto_refused)
