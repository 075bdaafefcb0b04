"""Save and load on two ranks: exact resumption, weights alone, whole weights, and `deepspeed.utils.safe_*`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from hift_testing.fingerprints import all_by_block, changed, digest, state_by_block, weights_by_name
from hift_testing.messages import error_of
from hift_testing.resuming import resume, seeded_engine
from hift_testing.selection import slow
from hift_testing.training import (
    DTYPES,
    batch_of,
    cast_parameters,
    ds_config,
    engine_of,
    run_steps,
    small_llama,
    whole_weights,
)

from hift_ds.state.formats import split_master

pytestmark = pytest.mark.multi_rank

SPLIT = {"kernel": "triton", "state": {"master": "split16"}}
SPLIT_INT8 = {"kernel": "triton", "state": {"master": "split16", "moments": "int8"}}
NO_MASTER = {"kernel": "triton", "state": {"master": "none", "moments": "bf16"}}
# stage, dtype, hift section, steps before the checkpoint (six blocks, so 8 is inside the second cycle), scheduler, rule
RUNS = {
    "zero0-fp32": (0, "fp32", {}, 8, False),
    "zero1-fp32": (1, "fp32", {}, 8, True),
    "zero2-fp32": (2, "fp32", {"order": "random"}, 8, False),
    "zero3-fp32": (3, "fp32", {}, 8, True),
    "zero0-bf16": (0, "bf16", {"order": "random"}, 8, True),
    "zero1-bf16-always": (1, "bf16", {"always_active": ["down_proj"], "frozen": ["layers.1.mlp.up"]}, 8, False),
    "zero2-bf16": (2, "bf16", {"lr_update": "paper"}, 8, True),
    "zero3-bf16-always": (3, "bf16", {"always_active": ["down_proj"], "frozen": ["layers.1.mlp.up"]}, 8, True),
    "zero2-bf16-first-cycle": (2, "bf16", {"steps_per_block": 2, "inactive_state": "reset"}, 3, True),
    "zero3-bf16-first-cycle": (3, "bf16", {}, 2, False),
    "zero2-bf16-at-start": (2, "bf16", {}, 0, True),
    "zero1-fp16": (1, "fp16", {}, 8, False),
    "zero2-split16-int8": (2, "bf16", SPLIT_INT8, 8, False),
    "zero3-split16-always": (3, "bf16", {**SPLIT, "always_active": ["down_proj"]}, 8, True),
    "zero3-none-bf16": (3, "bf16", NO_MASTER, 8, False),
    "zero2-bf16-adafactor": (2, "bf16", {}, 8, False, "adafactor"),
}


# All at stage 3 cost four times as much as below; what these cross is met by the others one by one.
SLOW_RUNS = (
    "zero0-fp32", "zero2-fp32", "zero3-fp32", "zero3-bf16-always", "zero3-split16-always", "zero3-none-bf16",
    "zero1-fp32", "zero2-bf16", "zero2-bf16-at-start", "zero0-bf16",
)  # fmt: skip


@pytest.mark.parametrize("run", [slow(run) if run in SLOW_RUNS else run for run in RUNS])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_by_bit(two_ranks, tmp_path, run):
    stage, dtype, hift, saved_at, *others = RUNS[run]
    assert two_ranks.run(resume, str(tmp_path), stage, dtype, hift, saved_at, 5, *others) == [stage < 3] * 2


def loaded_within_a_window(folder: str, stage: int) -> None:
    """Two steps after a checkpoint, and two after it is loaded with a micro step's gradients there."""
    engine, found = engine_of(ds_config(stage, "bf16", {}, gradient_accumulation_steps=2)), []
    run_steps(engine, 3)
    engine.save_checkpoint(folder)
    for _ in range(2):
        run_steps(engine, 2, start=3)
        found.append(all_by_block(engine))
        engine.backward(engine(**batch_of(9, 0, dist.get_rank())).loss)
        engine.step()  # of the first of two micro steps
        engine.load_checkpoint(folder)
    straight, loaded = found
    assert straight == loaded


@pytest.mark.parametrize("stage", (0, slow(1), slow(2), 3))
def test_a_load_within_a_window_forgets_its_gradients_and_begins_a_new_one(two_ranks, tmp_path, stage):
    two_ranks.run(loaded_within_a_window, str(tmp_path), stage)


def set_after_a_save(folder: str, stage: int) -> None:
    """Weights written with `safe_set_full_fp32_param` where stage 3 has just gathered small parameters."""
    engine = seeded_engine(stage, "bf16", {}, seed=0)
    run_steps(engine, 2)
    engine.save_checkpoint(folder)
    generator = torch.Generator().manual_seed(1)
    wanted = {name: torch.randn(weight.shape, generator=generator) for name, weight in whole_weights(engine).items()}
    engine.save_checkpoint(folder)
    for name, param in engine.module.named_parameters():
        safe_set_full_fp32_param(param, wanted[name])
    right = cast_parameters(small_llama(0), torch.bfloat16)
    right.load_state_dict(wanted)
    with torch.no_grad():
        losses = [model(**batch_of(3, 0, 0)).loss.item() for model in (engine, right)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_set_after_a_save_are_those_of_the_next_forward(two_ranks, tmp_path, stage):
    two_ranks.run(set_after_a_save, str(tmp_path), stage)


def weights_alone(folder: str, stage: int, dtype: str, load: dict[str, bool]) -> None:
    """An engine with other blocks and another optimizer takes the weights of a checkpoint."""
    first = seeded_engine(stage, dtype, {}, seed=0)
    run_steps(first, 8)
    first.save_checkpoint(folder)
    saved = whole_weights(first)
    config = ds_config(stage, dtype, {"layers_per_block": 2, "order": "top2down"})
    config["optimizer"] = {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}}
    fresh = engine_of(config, small_llama(1))
    run_steps(fresh, 1)
    before = state_by_block(fresh)
    fresh.load_checkpoint(folder, **load)
    loaded = whole_weights(fresh)
    masters = {name: safe_get_full_fp32_param(param) for name, param in fresh.module.named_parameters()}
    assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []
    assert [name for name in saved if not torch.equal(saved[name].float(), masters[name])] == []
    assert [[state.step for state in units] for units in fresh.optimizer.block_states] == [[0, 0], [0, 0], [1, 1]]
    assert fresh.hift.active_block == 1
    assert fresh.global_steps == (1 if "load_module_only" in load else 8)
    after = state_by_block(fresh)
    # masters were taken anew (fp32 weights are their own)
    assert changed(before, after) == ([] if dtype == "fp32" else ["0", "1", "2"])
    run_steps(fresh, 1, start=1)
    assert changed(after, state_by_block(fresh)) == ["1"]


@pytest.mark.parametrize(
    ("stage", "argument", "value"),
    [
        (0, "load_optimizer_states", False), (1, "load_module_only", True), (2, "load_optimizer_states", False),
        (3, "load_module_only", True), slow(0, "load_module_only", True), slow(1, "load_optimizer_states", False),
        slow(2, "load_module_only", True), slow(3, "load_optimizer_states", False),
    ],
)  # fmt: skip
def test_weights_alone_are_taken_by_a_run_with_other_blocks(two_ranks, tmp_path, stage, argument, value):
    two_ranks.run(weights_alone, str(tmp_path), stage, "fp32" if stage == 1 else "bf16", {argument: value})


def newly_frozen(folder: str, stage: int) -> None:
    """Weights alone, of parameters that were trained then and are frozen now."""
    first = seeded_engine(stage, "bf16", {}, seed=0)
    run_steps(first, 2)
    first.save_checkpoint(folder)
    fresh = seeded_engine(stage, "bf16", {"frozen": ["embed_tokens"]}, seed=1)
    fresh.load_checkpoint(folder, load_module_only=True)
    assert weights_by_name(first) == weights_by_name(fresh)


@pytest.mark.parametrize("stage", range(4))
def test_weights_alone_may_be_frozen_now(two_ranks, tmp_path, stage):
    two_ranks.run(newly_frozen, str(tmp_path), stage)


def exported(folder: str, stage: int, dtype: str) -> None:
    """`save_16bit_model` after a few steps."""
    config = ds_config(stage, dtype, {}, zero_optimization={"stage3_gather_16bit_weights_on_model_save": True})
    engine = engine_of(config, small_llama(0))
    run_steps(engine, 3)
    assert engine.save_16bit_model(folder)
    dist.barrier()
    content, weights = torch.load(Path(folder, "pytorch_model.bin"), weights_only=True), whole_weights(engine)
    run_steps(engine, 1, start=3)  # the export has left the engine able to train
    assert [name for name in weights if name not in content or not torch.equal(content[name], weights[name])] == []
    assert {tensor.dtype for tensor in content.values()} == {DTYPES[dtype]}


@pytest.mark.parametrize(("stage", "dtype"), [(3, "bf16"), slow(3, "fp32"), (1, "bf16")])
def test_exported_weights_are_whole(two_ranks, tmp_path, stage, dtype):
    two_ranks.run(exported, str(tmp_path), stage, dtype)


def fragments(stage: int, dtype: str) -> list[str]:
    """Fingerprints of what deepspeed.utils reads for every parameter, in the middle of a window and after a step:
    masters, moments, gradients."""
    engine = seeded_engine(stage, dtype, {}, seed=0)
    run_steps(engine, 8)
    named = dict(engine.module.named_parameters())
    active = set(engine.hift.blocks[engine.hift.active_block].fqns)
    engine.backward(engine(**batch_of(8, 0, dist.get_rank())).loss)
    grads = {name: grad for name, param in named.items() if (grad := safe_get_full_grad(param)) is not None}
    assert set(grads) == active
    engine.step()
    assert [name for name, param in named.items() if safe_get_full_grad(param) is not None] == []
    masters = {name: safe_get_full_fp32_param(param) for name, param in named.items()}
    moments = {name: safe_get_full_optimizer_state(param, "exp_avg") for name, param in named.items()}
    weights = whole_weights(engine)
    for name, master in masters.items():
        assert master.shape == moments[name].shape == weights[name].shape, name
        assert master.dtype == torch.float32 and torch.equal(master.to(weights[name].dtype), weights[name]), name
        assert moments[name].any(), name
    # of 39: the masters, not the bf16 weights
    assert sum(not torch.equal(master, weights[name].float()) for name, master in masters.items()) > 10
    error = error_of(lambda: safe_get_full_optimizer_state(named["lm_head.weight"], "momentum"))
    assert error == "ValueError: optim_state_key='momentum': adamw keeps exp_avg, exp_avg_sq"
    return [digest(tensors) for tensors in (masters.values(), moments.values(), (g.float() for g in grads.values()))]


def test_deepspeed_utils_answer_for_every_parameter_at_every_stage(two_ranks):
    results = [result for stage in range(4) for result in two_ranks.run(fragments, stage, "bf16")]
    # bf16 runs are equal at all stages; at stage 0 nothing is cut
    assert results == results[:1] * 8


def fragments_set(stage: int, dtype: str, hift: dict[str, Any] | None = None) -> None:
    """Writes master, state and gradient of an active and of an inactive parameter."""
    engine = seeded_engine(stage, dtype, hift or {}, seed=0)
    run_steps(engine, 6)
    named, written = dict(engine.module.named_parameters()), ("model.embed_tokens.weight", "lm_head.weight")
    before = weights_by_name(engine)
    for name in written:  # block 0 is active, the head's is the last
        param = named[name]
        value = torch.arange(safe_get_full_fp32_param(param).numel(), dtype=torch.float32).view(96, 40) / 1024 + 2**-12
        safe_set_full_fp32_param(param, value)
        safe_set_full_optimizer_state(param, value + 1, "exp_avg_sq")
        weight = whole_weights(engine)[name]
        assert torch.equal(safe_get_full_fp32_param(param), value)
        assert torch.equal(safe_get_full_optimizer_state(param, "exp_avg_sq"), value + 1)
        assert torch.equal(weight, split_master(value)[0] if hift else value.to(weight.dtype))  # ties: half up
    assert set(changed(before, weights_by_name(engine))) <= set(written)
    engine.backward(engine(**batch_of(6, 0, dist.get_rank())).loss)
    ones = torch.ones(96, 40)
    safe_set_full_grad(named["model.embed_tokens.weight"], ones)
    assert torch.equal(safe_get_full_grad(named["model.embed_tokens.weight"]).float(), ones)
    error = error_of(lambda: safe_set_full_grad(named["lm_head.weight"], ones))
    assert error.startswith("RuntimeError: no gradient to set")
    engine.step()
    assert float(engine.get_global_grad_norm()) == pytest.approx((96 * 40) ** 0.5)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), slow(3, "bf16")])
def test_deepspeed_utils_write_master_state_and_gradient(two_ranks, stage, dtype):
    two_ranks.run(fragments_set, stage, dtype)


@pytest.mark.parametrize("stage", [0, slow(2), 3])
def test_deepspeed_utils_write_the_fp32_master_of_a_split_weight(two_ranks, stage):
    two_ranks.run(fragments_set, stage, "bf16", SPLIT)
