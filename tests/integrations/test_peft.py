"""LoRA under HiFT: the rotation goes over the adapters, the base stays as it is, and all adapters are saved."""

from __future__ import annotations

import pytest
import torch
from deepspeed import comm as dist
from hift_testing.selection import slow
from hift_testing.trainers import arguments, assert_equal, auto_config, forget, losses_of, rows, trainer_of
from hift_testing.training import small_llama, whole_weights
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import hift_ds
from hift_ds.engine import HiFTEngine

pytestmark = pytest.mark.multi_rank
STEPS = 6  # of four blocks


def adapted():
    forget()
    model = small_llama()
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def trained(folder, stage, resume=None, **more):
    model = adapted()
    args = arguments(folder, auto_config(stage), STEPS, save_strategy="steps", save_steps=3, **more)
    trainer = trainer_of(model, args, rows(8 * dist.get_world_size()))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_adapters(folder, stage):
    before = {name: param.detach().clone() for name, param in adapted().named_parameters()}
    with hift_ds.enable():
        trainer = trained(folder / "whole", stage)
        engine = trainer.model_wrapped
        assert isinstance(engine, HiFTEngine) and len(engine.hift.blocks) == 4
        trainer.save_model(str(folder / "adapter"))
        dist.barrier()
        weights, losses = whole_weights(engine), losses_of(trainer)
        engine.destroy()
        moved = {name for name in weights if not torch.equal(weights[name], before[name])}
        assert moved == {name for name in weights if "lora_" in name}
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        ours = {name.replace(".default", ""): weights[name] for name in moved}
        assert_equal(saved, ours)
        again = trained(folder / "again", stage, resume=str(folder / "whole" / "checkpoint-3"))
        assert losses_of(again) == losses
        assert_equal(whole_weights(again.model_wrapped), weights)
        again.model_wrapped.destroy()


@pytest.mark.parametrize("stage", [slow(0), 2, slow(3)])
def test_the_rotation_goes_over_the_adapters_and_all_of_them_are_saved(two_ranks, tmp_path, stage):
    two_ranks.run(assert_adapters, tmp_path, stage)
