"""A checkpoint of any ranks and any ZeRO stage goes on at any other: the same weights and state, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from hift_testing.fingerprints import changed, digest, state_by_block, weights_by_name
from hift_testing.messages import logged
from hift_testing.resuming import seeded_engine
from hift_testing.selection import slow
from hift_testing.training import batch_of, ds_config, engine_of, largest_difference, run_steps, small_llama
from safetensors import safe_open

from hift_ds.checkpoint.content import slots_of
from hift_ds.state.formats import decode_int8, encode_int8

pytestmark = pytest.mark.multi_rank
SPLIT = {"kernel": "triton", "state": {"master": "split16"}}
NONE = {"kernel": "triton", "state": {"master": "none", "moments": "bf16"}}
INT8 = {"kernel": "triton", "state": {"master": "split16", "moments": "int8"}}
# ranks and stage of each run, which resumes from the one before
ROUND = ((1, 0), (2, 1), (1, 3), (2, 2), (2, 3), (1, 1), (2, 0), (1, 2), (2, 3), (2, 1), (1, 0))
FORMS: dict[str, Any] = {
    "fp32": ("fp32", {"order": "random"}), "bf16": ("bf16", {"always_active": ["down_proj"]}),
    "split16": ("bf16", SPLIT), "none": ("bf16", {**NONE, "frozen": ["layers.1.mlp.up"]}),
}  # fmt: skip


SLOW_ROUNDS = [slow("bf16", "adamw"), slow("none", "adamw"), slow("bf16", "adafactor")]


def whole(engine: Any) -> dict[str, str]:
    """A fingerprint of each parameter's weight, master and moments, all of them whole. Collective."""
    found = weights_by_name(engine)
    trained = [(fqn, slots_of(state)) for state in engine.optimizer.states for fqn in state.shard.fqns]
    named = dict(engine.module.named_parameters())
    for name, slots in trained:
        parts = [safe_get_full_optimizer_state(named[name], slot) for slot in slots]
        found[f"{name} state"] = digest([safe_get_full_fp32_param(named[name]), *parts])
    extra = {f"{key}": digest([value]) for state in engine.optimizer.states for key, value in state.extra.items()}
    return {**found, **extra}


def begun(folder: str, stage: int, dtype: str, hift: dict[str, Any], rule: str) -> dict[str, str]:
    engine = seeded_engine(stage, dtype, hift, 0, rule=rule)
    run_steps(engine, 8)
    engine.save_checkpoint(folder, tag="0")
    return whole(engine)


def gone_on(folder: str, number: int, stage: int, dtype: str, hift: dict[str, Any], rule: str) -> Any:
    """Loads the checkpoint before this one, and saves it again; what it is, and what has been said."""
    engine = seeded_engine(stage, dtype, hift, number, rule=rule)
    with logged("hift_ds.engine_loading") as notes:
        engine.load_checkpoint(folder, tag=str(number - 1))
    facts = (engine.optimizer.rotation.step, [state.step for state in engine.optimizer.states], engine.global_steps)
    engine.save_checkpoint(folder, tag=str(number), save_latest=False)
    return whole(engine), facts, notes


@pytest.mark.parametrize(("form", "rule"), [("fp32", "adamw"), ("split16", "adamw"), *SLOW_ROUNDS])
def test_weights_and_state_go_round_all_stages_and_numbers_of_ranks_without_a_bit_changed(
    one_rank, two_ranks, tmp_path, form, rule
):
    dtype, hift = FORMS[form]
    pools = {1: one_rank, 2: two_ranks}
    (first, *_) = pools[1].run(begun, str(tmp_path), 0, dtype, hift, rule)
    for number, (ranks, stage) in enumerate(ROUND[1:], 1):
        results = pools[ranks].run(gone_on, str(tmp_path), number, stage, dtype, hift, rule)
        for found, facts, _ in results:
            assert changed(first, found) == [] and len(found) == len(first), (number, ranks, stage)
            assert facts[0] == 8 and set(facts[1]) <= {1, 2, 8} and facts[2] == 8
        assert all("cut anew" in note for _, _, notes in results for note in notes)
        for path in (tmp_path / str(number)).glob("*.safetensors"):  # as others read them
            with safe_open(path, "pt") as file:
                assert file.keys()
    lone = [path for path in (tmp_path / "10").glob("*block_0*")]
    with safe_open(lone[0], "pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").shape == (96, 40)  # in its own shape where it is whole


@pytest.mark.parametrize("pair", [slow(((4, 2), (2, 3))), slow(((2, 1), (4, 3))), slow(((4, 3), (1, 0)))])
def test_four_ranks_go_on_as_two_and_one(one_rank, two_ranks, four_ranks, tmp_path, pair):
    pools = {1: one_rank, 2: two_ranks, 4: four_ranks}
    ((ranks, stage), after) = pair
    first = pools[ranks].run(begun, str(tmp_path), stage, "bf16", SPLIT, "adamw")[0]
    found = pools[after[0]].run(gone_on, str(tmp_path), 1, after[1], "bf16", SPLIT, "adamw")[0]
    assert changed(first, found[0]) == []


def trained_on(folder: str, stage: int, load: bool, steps: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Steps on the same four rows each, whatever the ranks; saved at the end of the first."""
    hift = {"order": "random", "lr_update": "step"}
    rows = 4 // dist.get_world_size()
    config = ds_config(stage, "fp32", hift, train_micro_batch_size_per_gpu=rows, gradient_clipping=0.5)
    engine = engine_of(config, small_llama(1 if load else 0))
    if load:
        engine.load_checkpoint(folder)
    for step in range(*steps):
        batch = {key: torch.cat([batch_of(step, 0, rank)[key] for rank in (0, 1)]) for key in batch_of(step, 0, 0)}
        mine = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
        engine.backward(engine(**{key: value[mine] for key, value in batch.items()}).loss)
        engine.step()
    if not load:
        engine.save_checkpoint(folder)
    return {name: safe_get_full_fp32_param(param).clone() for name, param in engine.module.named_parameters()}


PAIRS = [((2, 2), (1, 3)), ((1, 0), (2, 3)), slow((2, 3), (2, 1)), slow((2, 0), (1, 1))]


@pytest.mark.parametrize(("first", "then"), PAIRS)
def test_the_steps_that_follow_are_those_of_a_run_that_was_not_cut(one_rank, two_ranks, tmp_path, first, then):
    pools = {1: one_rank, 2: two_ranks}
    straight = pools[first[0]].run(trained_on, str(tmp_path / "whole"), first[1], False, (0, 14))[0]
    pools[first[0]].run(trained_on, str(tmp_path), first[1], False, (0, 8))
    found = pools[then[0]].run(trained_on, str(tmp_path), then[1], True, (8, 14))[0]
    assert largest_difference(straight, found) < 2e-6


def other_blocks(folder: str, stage: int, hift: dict[str, Any], says: str) -> None:
    """Another rotation takes the state, parameter by parameter, and begins a cycle."""
    first = seeded_engine(stage, "bf16", {}, 0)
    run_steps(first, 8)
    first.save_checkpoint(folder)
    other = seeded_engine(stage, "bf16", hift, 1)
    with logged("hift_ds.engine_loading") as notes:
        other.load_checkpoint(folder)
    before, after = whole(first), whole(other)
    assert [name for name in after if before[name] != after[name]] == []
    assert other.optimizer.rotation.at_cycle_start and other.optimizer.rotation.step >= 1
    if dist.get_rank() == 0:
        assert says in notes[-1] and len(notes) == 1 + ("always_active" in hift), notes
        assert all("always active were none, and are " in note for note in notes[:-1])
    run_steps(other, 8, start=8)
    assert all(torch.isfinite(weight).all() for weight in other.module.parameters())


@pytest.mark.parametrize(
    ("stage", "hift"),
    [
        (2, {"layers_per_block": 2}), (3, {"order": "top2down", "layers_per_block": 4}), (0, {"steps_per_block": 2}),
        (1, {"always_active": ["norm"], "frozen": ["layers.1.mlp.up"]}),
        (2, {"layers_per_block": 100, "update": "backward"}),
    ],
)  # fmt: skip
def test_other_blocks_and_orders_take_the_state_of_each_parameter_and_begin_a_cycle(two_ranks, tmp_path, stage, hift):
    two_ranks.run(other_blocks, str(tmp_path), stage, hift, "a cycle begins")


def converted(folder: str, stage: int, then: dict[str, Any], now: dict[str, Any]) -> None:
    """State of one form is taken by another; what both have room for is the same."""
    first = seeded_engine(stage, "bf16", then, 0)
    run_steps(first, 8)
    first.save_checkpoint(folder)
    other = seeded_engine(stage, "bf16", now, 1)
    with logged("hift_ds.engine_loading") as notes:
        other.load_checkpoint(folder)
    if dist.get_rank() == 0:
        assert len(notes) == 1 and "masters and moments are converted" in notes[0], notes
    forms = [hift.get("state", {}) for hift in (then, now)]
    exact = "none" not in [form.get("master") for form in forms]
    int8 = "int8" in [form.get("moments") for form in forms]
    mine, differ = dict(other.module.named_parameters()), {"exp_avg": [0.0], "exp_avg_sq": [0.0]}
    largest = dict.fromkeys(differ, 0.0)
    for name, param in first.module.named_parameters():
        masters = [safe_get_full_fp32_param(one) for one in (param, mine[name])]
        assert torch.equal(*masters) if exact else (masters[0] - masters[1]).abs().max() < 2**-7, name
        for slot, found in differ.items():
            one, two = (safe_get_full_optimizer_state(each, slot) for each in (param, mine[name]))
            found.append(float((one - two).abs().max()))
            largest[slot] = max(largest[slot], float(one.abs().max()))
    for slot, found in differ.items():
        assert max(found) <= (0.01 if int8 else 2**-8) * largest[slot], slot
    run_steps(other, 1, start=8)


@pytest.mark.parametrize(
    ("stage", "then", "now"),
    [(2, {}, SPLIT), (3, SPLIT, {}), (1, {}, INT8), (3, INT8, {}), (0, SPLIT, NONE), (2, NONE, INT8)],
    ids=["split", "joined", "to-int8", "from-int8", "rounded", "none-to-int8"],
)
def test_another_form_of_state_is_converted_and_a_note_says_so(two_ranks, tmp_path, stage, then, now):
    two_ranks.run(converted, str(tmp_path), stage, then, now)


def other_dtype(folder: str, stage: int, dtypes: tuple[str, str]) -> None:
    """The masters are the same, though the weights are of another dtype: no bit of them is lost."""
    first = seeded_engine(stage, dtypes[0], {}, 0)
    run_steps(first, 8)
    first.save_checkpoint(folder)
    other = seeded_engine(stage, dtypes[1], {}, 1)
    scale = other.optimizer.loss_scale
    with logged("hift_ds.engine_loading") as notes:
        other.load_checkpoint(folder)
    assert "masters and moments are converted" in notes[0] if dist.get_rank() == 0 else notes == []
    mine = dict(other.module.named_parameters())
    for name, param in first.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(param), safe_get_full_fp32_param(mine[name])), name
    assert other.optimizer.loss_scale == scale
    run_steps(other, 1, start=8)


@pytest.mark.parametrize("stage", (slow(0), 2, 3))
@pytest.mark.parametrize("dtypes", [("bf16", "fp32"), ("fp32", "bf16"), slow(("bf16", "fp16"))])
def test_weights_of_another_dtype_keep_the_masters_bit_by_bit(two_ranks, tmp_path, stage, dtypes):
    two_ranks.run(other_dtype, str(tmp_path), stage, dtypes)


def same_codes(folder: str, stage: int) -> None:
    first = seeded_engine(stage, "bf16", {**INT8, "layers_per_block": 2}, 0)
    run_steps(first, 8)
    first.save_checkpoint(folder)
    again = seeded_engine(stage, "bf16", {**INT8, "layers_per_block": 2}, 1)
    again.load_checkpoint(folder)
    assert changed(state_by_block(first), state_by_block(again)) == []


@pytest.mark.parametrize("stage", (0, 2, 3))
def test_moments_in_8_bits_are_the_same_codes_where_they_are_cut_alike(two_ranks, tmp_path, stage):
    two_ranks.run(same_codes, str(tmp_path), stage)


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_that_is_decoded_and_encoded_is_itself(signed):
    codes = torch.arange(255, dtype=torch.uint8).repeat(3)
    codes = codes[codes != 128] if signed else codes  # minus zero
    codes[::200] = 127 if signed else 254  # the largest is the scale
    scales = torch.tensor([0.5, 3.0, 1e-8])
    values = decode_int8(codes, scales, 0, signed)
    again, found = encode_int8(values, signed)
    assert torch.equal(found, scales) and torch.equal(again, codes)


def weights_alone(folder: str, stage: int) -> dict[str, str]:
    engine = seeded_engine(stage, "bf16", {"layers_per_block": 2, "frozen": ["embed_tokens"]}, 1)
    engine.load_checkpoint(folder, tag="0", load_module_only=True)
    assert engine.global_steps == engine.optimizer.rotation.step == 0
    return weights_by_name(engine)


@pytest.mark.parametrize(("then", "now"), [(3, 2), (2, 3), (3, 3), (0, 3)])
def test_weights_alone_come_from_other_ranks_and_stages_too(one_rank, two_ranks, tmp_path, then, now):
    first = two_ranks.run(begun, str(tmp_path), then, "bf16", {"frozen": ["layers.1.mlp.up"]}, "adamw")[0]
    found = one_rank.run(weights_alone, str(tmp_path), now)[0]
    assert [name for name in found if found[name] != first[name]] == []
