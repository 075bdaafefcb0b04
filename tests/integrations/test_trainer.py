"""transformers' Trainer with `hift_ds.enable()`: bit for bit the loop with `hift_ds.initialize` on the same batches."""

from __future__ import annotations

import pytest
from deepspeed import comm as dist
from hift_testing.selection import slow
from hift_testing.trainers import arguments, assert_equal, auto_config, decay_groups, loop, rows, trainer_of
from hift_testing.training import small_llama, whole_weights

import hift_ds
from hift_ds.engine import HiFTEngine

pytestmark = pytest.mark.multi_rank

STEPS = 9  # of six blocks
VARIANTS = {
    "config": {},
    "trainers": {"optimizer": False},
    "bf16": {"bf16": True},
    "one_micro_step": {"micro_steps": 1, "optimizer": False},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "paper": {"optimizer": False, "hift": {"lr_update": "paper"}},
    "step": {"optimizer": False, "hift": {"lr_update": "step", "layers_per_block": 2, "order": "top2down"}},
}
QUICK = {("config", 2), ("trainers", 3), ("bf16", 2), ("step", 0)}
CASES = [
    (name, stage) if (name, stage) in QUICK else slow(name, stage) for name in VARIANTS for stage in (0, 1, 2, 3)
]


def weights_of(trainer):
    assert isinstance(trainer.model_wrapped, HiFTEngine)
    return whole_weights(trainer.model_wrapped)


def assert_trainer_is_the_loop(
    folder, stage, optimizer=True, hift=None, bf16=False, micro_steps=2, **more
):
    config, data = auto_config(stage, optimizer, hift), rows(8 * dist.get_world_size())
    with hift_ds.enable():
        args = arguments(folder, config, STEPS, gradient_accumulation_steps=micro_steps, bf16=bf16, **more)
        trainer = trainer_of(small_llama(), args, data)
        trainer.train()
    weights = weights_of(trainer)
    assert all(param.requires_grad for param in trainer.model.parameters())
    trainer.model_wrapped.destroy()
    model = small_llama()
    if "gradient_checkpointing" in more:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ours = None if optimizer else decay_groups(model)
    assert_equal(weights, loop(model, config, data, STEPS, micro_steps=micro_steps, bf16=bf16, optimizer=ours))


@pytest.mark.parametrize(("variant", "stage"), CASES)
def test_weights_are_bitwise_those_of_a_loop_on_two_ranks(two_ranks, tmp_path, variant, stage):
    two_ranks.run(assert_trainer_is_the_loop, tmp_path, stage, **VARIANTS[variant])


def assert_kept(folder):
    """The Trainer turns checkpointing on in every layer; what the user has kept out of it stays so."""
    model = small_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hift_ds.keep_activations(model, 2)
    with hift_ds.enable():
        args = arguments(folder, auto_config(2, True, None), 2, gradient_checkpointing=True)
        trainer = trainer_of(model, args, rows(8))
        trainer.train()
    flags = [layer.gradient_checkpointing for layer in model.model.layers]
    assert flags == [True] * (len(flags) - 2) + [False] * 2
    trainer.model_wrapped.destroy()


def test_layers_that_keep_their_activations_do_so_under_the_trainer(one_rank, tmp_path):
    one_rank.run(assert_kept, tmp_path)


@pytest.mark.parametrize(("variant", "stage"), [("config", 0), slow("trainers", 2), slow("bf16", 3), slow("paper", 0)])
def test_weights_are_bitwise_those_of_a_loop_on_one_rank(one_rank, tmp_path, variant, stage):
    one_rank.run(assert_trainer_is_the_loop, tmp_path, stage, **VARIANTS[variant])
