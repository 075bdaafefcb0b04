"""Save and load on two ranks: exact resumption, weights alone, and refusals that reach every rank."""

from __future__ import annotations

import re

import pytest
from hift_testing import checkpoint_cases as cases
from hift_testing.selection import slow

pytestmark = pytest.mark.multi_rank

COMPACT = [
    {"kernel": "triton", "state": {"master": "split16", "moments": "int8"}},
    {"kernel": "triton", "state": {"master": "split16"}},
    {"kernel": "triton", "state": {"master": "none", "moments": "bf16"}},
]
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
    "zero2-split16-int8": (2, "bf16", COMPACT[0], 8, False),
    "zero3-split16-always": (3, "bf16", {**COMPACT[1], "always_active": ["down_proj"]}, 8, True),
    "zero3-none-bf16": (3, "bf16", COMPACT[2], 8, False),
    "zero2-bf16-adafactor": (2, "bf16", {}, 8, False, "adafactor"),
}


# All at stage 3 cost four times as much as below; what these cross is met by the others one by one.
SLOW_RUNS = (
    "zero0-fp32", "zero2-fp32", "zero3-fp32", "zero3-bf16-always", "zero3-split16-always", "zero3-none-bf16",
)  # fmt: skip


@pytest.mark.parametrize("run", [slow(run) if run in SLOW_RUNS else run for run in RUNS])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_by_bit(two_ranks, tmp_path, run):
    stage, dtype, hift, saved_at, *others = RUNS[run]
    for result in two_ranks.run(cases.resume, str(tmp_path), stage, dtype, hift, saved_at, 5, *others):
        assert len(result["different"]) >= 6
        assert result["mine"] == saved_at
        assert result["resumed"] == result["expected"]
        assert result["rolled_back"] == result["expected"]
        assert result["whole_module"] == (stage < 3)


@pytest.mark.parametrize("stage", (0, slow(1), slow(2), 3))
def test_a_load_within_a_window_forgets_its_gradients_and_begins_a_new_one(two_ranks, tmp_path, stage):
    for straight, loaded in two_ranks.run(cases.loaded_within_a_window, str(tmp_path), stage):
        assert straight == loaded


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_set_after_a_save_are_those_of_the_next_forward(two_ranks, tmp_path, stage):
    for found in two_ranks.run(cases.set_after_a_save, str(tmp_path), stage):
        assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "argument", "value"),
    [
        (0, "load_optimizer_states", False), (1, "load_module_only", True), (2, "load_optimizer_states", False),
        (3, "load_module_only", True), slow(0, "load_module_only", True), slow(1, "load_optimizer_states", False),
        slow(2, "load_module_only", True), slow(3, "load_optimizer_states", False),
    ],
)  # fmt: skip
def test_weights_alone_are_taken_by_a_run_with_other_blocks(two_ranks, tmp_path, stage, argument, value):
    dtype = "fp32" if stage == 1 else "bf16"
    for facts in two_ranks.run(cases.weights_alone, str(tmp_path), stage, dtype, {argument: value}):
        assert facts["equal"] == facts["masters"] == []
        assert facts["steps"] == [0, 0, 1]
        assert facts["position"] == 1
        assert facts["global_steps"] == (1 if argument == "load_module_only" else 8)
        assert facts["next"] == ["1"]
        # masters were taken anew (fp32 weights are their own)
        assert facts["state"] == ([] if dtype == "fp32" else ["0", "1", "2"])


@pytest.mark.parametrize("stage", range(4))
def test_weights_alone_may_be_frozen_now_where_they_are_whole(two_ranks, tmp_path, stage):
    for facts in two_ranks.run(cases.newly_frozen, str(tmp_path), stage):
        assert facts["same"] == (stage < 3)
        assert facts["error"].startswith("RuntimeError: the checkpoint was written with another" if stage == 3 else "")
        assert bool(facts["error"]) == (stage == 3)


def test_checkpoints_that_do_not_fit_are_refused_on_every_rank(two_ranks, tmp_path):
    results = two_ranks.run(cases.refusals, str(tmp_path))
    alone = "load_module_only=True"
    for rank, found in enumerate(results):

        def other(key: str, says: str, advice: bool = True, found: dict = found) -> None:
            sentence = found[key]
            assert sentence.startswith("RuntimeError: the checkpoint was written with another"), (key, sentence)
            assert says in sentence
            assert (alone in sentence) == advice, sentence

        other("stage", "zero_optimization.stage (1; this run: 2)")
        other("to stage 0", "zero_optimization.stage (1; this run: 0)")
        other("to stage 3", "zero_optimization.stage (1; this run: 3)", advice=False)
        other("from stage 3", "zero_optimization.stage (3; this run: 2)", advice=False)
        other("from stage 3, weights alone", "zero_optimization.stage (3; this run: 2)", advice=False)
        sentence = "number of data-parallel ranks (4; this run: 2)"
        other("from stage 3 of other ranks, weights alone", sentence, advice=False)
        assert found["format"] == "RuntimeError: the checkpoint has HiFT format 99, this version reads 2"
        other("ranks", "number of data-parallel ranks (4; this run: 2)")
        other("blocks", "hift.layers_per_block")
        other("always active", "hift.always_active")
        other("order", "hift.order and hift.seed ([0, 1, 2, 3, 4, 5]; this run: [5, 4, 3, 2, 1, 0])")
        other("steps_per_block", "hift.steps_per_block (1; this run: 2)")
        other("optimizer", "optimizer.type ('adamw'; this run: 'lion')")
        sentence = "fp16 or bf16 (['bfloat16']; this run: ['float32'])"
        other("dtype at stage 3, weights alone", sentence, advice=False)
        other("dtype", "fp16 or bf16 (['bfloat16']; this run: ['float32'])")
        assert "was not written by HiFT" in found["plain"]
        assert alone in found["plain"]
        assert found["plain, weights alone"] == "[]"
        assert found["no tag"].startswith("ValueError: checkpoint")
        assert "no such folder" in found["no tag"]
        assert found["tags differ"] == (
            "RuntimeError: checkpoint tag: ranks 0 and 1 differ; every rank must be given the same"
        )
        assert found["empty"] == "(None, None)"  # as DeepSpeed, which warns
        assert found["empty changed"] == "[]"
        assert found["broken on rank 1"].startswith("RuntimeError: rank 1 failed:" if rank == 0 else "RuntimeError: ")


MISFITS = {
    "another number of groups": "another number of param groups (1; this run: 2)",
    "other groups": "another hift.layers_per_block, hift.blocks, hift.frozen, hift.always_active and the param groups",
    "momentum on": "optimizer.params (momentum) decide",
    "momentum off": "optimizer.params (momentum) decide",
    "other blocks": "another hift.layers_per_block",
    "another shape": "'lm_head.weight' of shape (96, 40), the model of shape (100, 40)",
    "another shape below stage 3": "'lm_head.weight' of shape (96, 40), the model of shape (100, 40)",
    "another name": "differ in 1 names, first 'extra'",
    "no schedule": "another lr_scheduler (None; this run: WarmupDecayLR)",
    "another schedule": "another lr_scheduler (WarmupDecayLR; this run: WarmupLR)",
    "another schedule of the same class": "the lr_scheduler (SequentialLR) does not take the checkpoint's state (Index",
    "a schedule by cycles": "another lr_scheduler (WarmupDecayLR; this run: WarmupDecayLR with hift.lr_update 'paper')",
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_run_that_differs_in_one_thing_is_refused_before_anything_is_changed(two_ranks, tmp_path, name):
    for sentence in two_ranks.run(cases.misfits, str(tmp_path), name):
        assert sentence.startswith("RuntimeError: the ")
        assert MISFITS[name] in sentence
        assert "CHANGED" not in sentence


@pytest.mark.parametrize("stage", [0, slow(2), 3])
def test_files_that_are_missing_cut_off_or_of_another_save_are_refused_before_anything_is_changed(
    two_ranks, tmp_path, stage
):
    model_file = "zero_pp_rank_1_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    optimizer_file = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt" if stage else model_file
    for found in two_ranks.run(cases.damaged, str(tmp_path), stage):
        assert found.pop("good") == "[]"
        assert found.pop("client state") == "False"
        assert found.pop("scripts") == "[]"
        assert "empty: a save was cut off" in found.pop("empty latest")
        # At stages 0 to 2 one file has all weights, so they are whole, of whichever save.
        alone = found.pop("weights alone")
        assert (model_file in alone and "another save" in alone) if stage == 3 else alone == ""
        assert "not written by HiFT" in found.pop("no manifest")
        assert "hift.json' cannot be read: it was cut off" in found.pop("cut manifest")
        another = "is of another save"
        says = {"older": another, "newer": another, "foreign": f"{another} (None)"}
        says |= {"no": "is missing", "cut": "cannot be read"}
        if stage:
            swapped = found.pop("swapped state")
            assert re.search("is of rank (0, and rank 1|1, and rank 0) would load it: files were renamed", swapped)
        named = {"state": optimizer_file, "weights": model_file, "manifest": "_states.pt"}
        for name, sentence in found.items():
            kind, what = name.split()
            assert named[what] in sentence
            assert says[kind] in sentence
        assert not any("CHANGED" in sentence for sentence in found.values())


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_that_failed_unheard_is_said_before_a_save_and_does_not_break_a_load(two_ranks, tmp_path, stage):
    for found in two_ranks.run(cases.after_a_step_that_failed, str(tmp_path), stage):
        assert "received no gradient on any rank" in found["save"]
        assert found["kept"]
        assert found["differs"] == []
        assert ["the last step before load_checkpoint()" in message for message in found["warnings"]] == [True]


@pytest.mark.parametrize("stage", [0, 1])
def test_the_optimizers_state_of_other_blocks_is_refused_before_anything_is_changed(two_ranks, stage):
    for found in two_ranks.run(cases.foreign_state, stage):
        assert found["error"].startswith("RuntimeError: the checkpoint was written with another hift.layers_per_block")
        assert found["changed"] == "[]"


@pytest.mark.parametrize(("stage", "dtype"), [(3, "bf16"), slow(3, "fp32"), (1, "bf16")])
def test_exported_weights_are_whole(two_ranks, tmp_path, stage, dtype):
    for result in two_ranks.run(cases.exported, str(tmp_path), stage, dtype):
        assert result["saved"]
        assert result["wrong"] == []
        assert result["dtypes"] == [f"torch.{'bfloat16' if dtype == 'bf16' else 'float32'}"]


def test_deepspeed_utils_answer_for_every_parameter_at_every_stage(two_ranks):
    results = [result for stage in range(4) for result in two_ranks.run(cases.fragments, stage, "bf16")]
    for result in results:
        assert result["wrong"] == result["after_step"] == result["still"] == []
        assert result["finer"] > 10  # of 39: the masters, not the bf16 weights
        assert result["with_grad"]
        # bf16 runs are equal at all stages; at stage 0 nothing is cut
        assert {key: result[key] for key in ("masters", "moments", "grads")} == {
            key: results[0][key] for key in ("masters", "moments", "grads")
        }
        assert result["error"] == "ValueError: optim_state_key='momentum': adamw keeps exp_avg, exp_avg_sq"


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), slow(3, "bf16")])
def test_deepspeed_utils_write_master_state_and_gradient(two_ranks, stage, dtype):
    for facts in two_ranks.run(cases.fragments_set, stage, dtype):
        assert facts["model.embed_tokens.weight"] == facts["lm_head.weight"] == [True, True, True]
        assert facts["others"] == []
        assert facts["grad"]
        assert facts["norm"] == pytest.approx((96 * 40) ** 0.5)
        assert facts["inactive grad"].startswith("RuntimeError: no gradient to set")


@pytest.mark.parametrize("stage", [0, slow(2), 3])
def test_deepspeed_utils_write_the_fp32_master_of_a_split_weight(two_ranks, stage):
    for facts in two_ranks.run(cases.fragments_set, stage, "bf16", COMPACT[1]):
        assert facts["model.embed_tokens.weight"] == facts["lm_head.weight"] == [True, True, True]
        assert facts["others"] == []


def test_a_checkpoint_of_another_form_of_state_is_refused(two_ranks, tmp_path):
    for error in two_ranks.run(cases.other_form, str(tmp_path), COMPACT[1]):
        assert "another hift.state.master and hift.state.moments (['split16', 'fp32']; this run: ['fp32'" in error
