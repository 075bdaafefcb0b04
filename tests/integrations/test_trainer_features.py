"""What Trainer does beside steps, with HiFT: resume, best model, export, evaluation, generation, out of memory."""

from __future__ import annotations

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param
from hift_testing.messages import error_of, messages
from hift_testing.selection import slow
from hift_testing.tiny_models import tiny_model
from hift_testing.trainers import (
    Ordered,
    arguments,
    assert_equal,
    auto_config,
    forget,
    loop,
    losses_of,
    rows,
    trainer_of,
)
from hift_testing.training import ds_config, largest_difference, small_llama, whole_weights
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import hift_ds
from hift_ds.engine import LIVING, HiFTEngine
from hift_ds.integrations.trainer import HiFTCallback

pytestmark = pytest.mark.multi_rank
STAGES = (0, 2, 3)
STEPS = 9  # of six blocks


def data():
    return rows(8 * dist.get_world_size())


def trained(folder, config, steps=STEPS, model=None, resume=None, kind=Ordered, train=None, trainer_takes=None, **more):
    """A Trainer that has trained."""
    with hift_ds.enable():
        model = small_llama() if model is None else model
        args = arguments(folder, config, steps, **more)
        trainer = trainer_of(model, args, data() if train is None else train, kind, **(trainer_takes or {}))
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def finished(trainer):
    """Its whole weights; its engine ends."""
    assert isinstance(trainer.model_wrapped, HiFTEngine)
    weights = whole_weights(trainer.model_wrapped)
    trainer.model_wrapped.destroy()
    return weights


# Resume.


def assert_resumes(folder, stage, optimizer, **more):
    more = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4, **more}
    config = auto_config(stage, optimizer)
    whole = trained(folder / "whole", config, **more)
    losses, weights = losses_of(whole), finished(whole)
    saved = str(folder / "whole" / "checkpoint-4")
    again = trained(folder / "again", config, resume=saved, model=small_llama(1), **more)
    assert losses_of(again) == losses
    assert_equal(finished(again), weights)


@pytest.mark.parametrize(("stage", "optimizer"), [(2, False), *map(slow, (0, 2, 3, 3), (True, True, True, False))])
def test_a_resumed_run_is_bitwise_the_whole_run(two_ranks, tmp_path, stage, optimizer):
    two_ranks.run(assert_resumes, tmp_path, stage, optimizer)


@pytest.mark.parametrize(("stage", "optimizer"), [slow(0, True), slow(2, False), slow(3, True)])
def test_a_resumed_run_in_bf16_is_bitwise_the_whole_run(one_rank, tmp_path, stage, optimizer):
    one_rank.run(assert_resumes, tmp_path, stage, optimizer, bf16=True)


def with_dropout(seed):
    model = small_llama(seed)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    return model


def assert_resumes_anywhere(folder, stage, resumed):
    """Shuffled rows that do not fill whole windows, dropout, a schedule: from each of its checkpoints."""
    more = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1, "kind": Trainer}
    more["train"] = rows(7 * dist.get_world_size())  # an epoch has three micro batches and a half, two windows
    config = auto_config(stage, False)
    whole = trained(folder / "whole", config, model=with_dropout(0), **more)
    losses, weights = losses_of(whole), finished(whole)
    for step in resumed:
        saved = str(folder / "whole" / f"checkpoint-{step}")
        again = trained(folder / f"from {step}", config, resume=saved, model=with_dropout(step), **more)
        assert losses_of(again) == losses, step
        assert_equal(finished(again), weights)


@pytest.mark.parametrize(("stage", "resumed"), [(2, (3, 4)), slow(0, (1, 2, 5)), slow(3, (2, 7))])
def test_a_run_of_shuffled_rows_with_dropout_goes_on_bitwise_from_any_step(two_ranks, tmp_path, stage, resumed):
    two_ranks.run(assert_resumes_anywhere, tmp_path, stage, resumed)


def full_then_hift(folder, stage):
    """How far one block is from plain DeepSpeed's Trainer, whose checkpoint it goes on from."""
    more = {"save_strategy": "steps", "save_steps": 4}
    plain = {key: value for key, value in auto_config(stage, False).items() if key != "hift"}
    whole = trained(folder / "full", {**plain, "zero_allow_untested_optimizer": True}, **more)
    weights = whole_weights(whole.model_wrapped)
    forget()
    config, saved = auto_config(stage, False, {"layers_per_block": 1000}), str(folder / "full" / "checkpoint-4")
    found = finished(trained(folder / "hift", config, resume=saved, model=small_llama(1), **more))
    return largest_difference(found, weights)


@pytest.mark.parametrize("stage", [slow(2), slow(3)])
def test_a_run_of_plain_deepspeed_goes_on_with_hift_in_trainer(two_ranks, tmp_path, stage):
    assert max(two_ranks.run(full_then_hift, tmp_path, stage)) < 1e-6


def assert_saves_in_background(folder):
    """The same checkpoints, whole when training ends; one alone would be removed before the next is there."""
    more = {"save_strategy": "steps", "save_steps": 2}
    config = auto_config(2, False)
    config["hift"] = {**config["hift"], "asynchronous_save": True}
    whole = finished(trained(folder / "whole", auto_config(2, False), 6, **more))
    trainer = trained(folder / "background", config, 6, save_total_limit=2, **more)
    assert not trainer.model_wrapped.saves_in_background
    assert_equal(finished(trainer), whole)
    for step in (4, 6):
        place = folder / "background" / f"checkpoint-{step}" / f"global_step{step}"
        assert (place / "hift.json").is_file() and not list(place.glob("*.writ*"))
    again = trained(
        folder / "again", config, 6, resume=str(folder / "background" / "checkpoint-4"), model=small_llama(1), **more
    )
    assert_equal(finished(again), whole)
    error = error_of(lambda: trained(folder / "one", config, 6, save_total_limit=1, **more))
    assert error.startswith("ValueError: save_total_limit=1: with hift.asynchronous_save Trainer would remove"), error


def test_trainer_s_checkpoints_are_written_in_the_background(two_ranks, tmp_path):
    two_ranks.run(assert_saves_in_background, tmp_path)


# What is saved.


def assert_loads(folder, weights):
    """As in a process without DeepSpeed."""
    unset_hf_deepspeed_config()
    assert_equal({n: p.detach() for n, p in LlamaForCausalLM.from_pretrained(folder).named_parameters()}, weights)


def assert_exports(folder, stage, bf16):
    trainer = trained(folder, auto_config(stage), bf16=bf16)
    trainer.save_model(str(folder / "model"))
    dist.barrier()
    weights = finished(trainer)
    assert_loads(folder / "model", weights)
    assert not list((folder / "model").glob("zero_to_fp32*"))


@pytest.mark.parametrize(("stage", "bf16"), [(3, True), *map(slow, (0, 2, 3, 0, 2), (0, 0, 0, 1, 1))])
def test_what_trainer_saves_from_pretrained_loads(two_ranks, tmp_path, stage, bf16):
    two_ranks.run(assert_exports, tmp_path, stage, bf16)


def assert_best_is_loaded(folder, stage):
    trainer = trained(
        folder, auto_config(stage), 8, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, save_total_limit=2,
        trainer_takes={"eval_dataset": rows(8)},
    )  # fmt: skip
    history = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = max(history, key=history.get)
    assert sorted(history) == [2, 4, 6, 8] and best < 8, "greater is better, and the loss falls: an early one is best"
    assert trainer.state.best_global_step == best
    assert trainer.evaluate(rows(8))["eval_loss"] == pytest.approx(history[best], abs=1e-6)
    kept = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{best}", "checkpoint-8"]
    finished(trainer)


@pytest.mark.parametrize("stage", [slow(0), slow(2), 3])
def test_the_best_model_is_loaded_at_the_end(two_ranks, tmp_path, stage):
    two_ranks.run(assert_best_is_loaded, tmp_path, stage)


def assert_saves_only_models(folder, stage):
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "save_total_limit": 1}
    trainer = trained(folder, auto_config(stage), 6, **saving)
    dist.barrier()
    (kept,) = folder.glob("checkpoint-*")
    assert kept.name == "checkpoint-6" and not list(kept.glob("global_step*"))
    weights = finished(trainer)
    assert_loads(kept, weights)


@pytest.mark.parametrize("stage", [slow(0), 2, slow(3)])
def test_save_only_model_and_save_total_limit_leave_one_folder_of_weights(two_ranks, tmp_path, stage):
    two_ranks.run(assert_saves_only_models, tmp_path, stage)


# Windows, evaluation, memory.


def assert_evaluation_changes_nothing(folder, stage):
    config = auto_config(stage)
    plain = trained(folder / "plain", config)
    losses, weights = losses_of(plain), finished(plain)
    watched = trained(
        folder / "watched", config, eval_strategy="steps", eval_steps=2, trainer_takes={"eval_dataset": rows(6)}
    )
    assert losses_of(watched) == losses
    assert_equal(finished(watched), weights)


@pytest.mark.parametrize("stage", [0, slow(2), slow(3)])
def test_evaluation_every_other_step_changes_no_weight(two_ranks, tmp_path, stage):
    two_ranks.run(assert_evaluation_changes_nothing, tmp_path, stage)


def assert_short_window(folder, stage):
    """Five batches a rank and windows of two: the third window of an epoch has one."""
    world = dist.get_world_size()
    few = rows(10 * world)
    trainer = trained(folder, auto_config(stage), 7, train=few, gradient_accumulation_steps=2)
    moved = trainer.model_wrapped.hift
    assert (moved.cycle, moved.active_block) == (1, 1), "seven updates"
    weights = finished(trainer)
    config = auto_config(stage)
    windows = [2, 2, 1, 2, 2, 1, 2]
    assert_equal(weights, loop(small_llama(), config, few, 7, micro_steps=2, windows=windows))


@pytest.mark.parametrize("stage", [slow(0), 2, slow(3)])
def test_a_short_last_window_is_an_update_of_what_it_has(two_ranks, tmp_path, stage):
    two_ranks.run(assert_short_window, tmp_path, stage)


class OutOfMemoryOnce(Ordered):
    """Fails as a card does, at the third step with the first batch size."""

    tried: list[int] = []

    def training_step(self, *args, **kwargs):
        if self._train_batch_size not in self.tried:
            self.tried.append(self._train_batch_size)
        if len(self.tried) == 1 and self.state.global_step == 2:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(*args, **kwargs)


def assert_finds_batch_size(folder, stage):
    OutOfMemoryOnce.tried = []
    trainer = trained(folder, auto_config(stage), kind=OutOfMemoryOnce, auto_find_batch_size=True)
    first, second = OutOfMemoryOnce.tried
    assert second < first
    assert len(losses_of(trainer)) >= STEPS and trainer.state.global_step == STEPS
    assert list(LIVING) == [trainer.model_wrapped]
    finished(trainer)


# Trainer itself refuses it at stage 3.
@pytest.mark.parametrize("stage", [slow(0), 2])
def test_a_smaller_batch_is_found_after_out_of_memory(one_rank, tmp_path, stage):
    one_rank.run(assert_finds_batch_size, tmp_path, stage)


# Other models and trainers.


def assert_generates(folder, stage):
    with hift_ds.enable():
        pairs = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows(8)]
        args = arguments(
            folder, auto_config(stage), 8, kind=Seq2SeqTrainingArguments, predict_with_generate=True,
            eval_strategy="steps", eval_steps=4,
        )  # fmt: skip
        seen = []
        trainer = trainer_of(
            tiny_model("t5"), args, pairs, Seq2SeqTrainer, eval_dataset=pairs[:4],
            compute_metrics=lambda found: seen.append(found.predictions.shape) or {"n": len(found.predictions)},
        )  # fmt: skip
        trainer.train()
    assert [shape[0] for shape in seen] == [4, 4], seen
    assert trainer.model_wrapped.hift.cycle == 1, "seven blocks"
    finished(trainer)


@pytest.mark.parametrize("stage", [slow(0), slow(2), 3])
def test_predict_with_generate_generates_between_steps(one_rank, tmp_path, stage):
    one_rank.run(assert_generates, tmp_path, stage)


def assert_head_trains_always(folder, stage):
    forget()
    config = auto_config(stage, hift={"always_active": ["^score"]})
    model = tiny_model("llama_cls")
    model.config.pad_token_id = 0
    seen = []

    class Watching(Ordered):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen.append(float(whole_weights(self.model_wrapped)["score.weight"].sum()))
            return loss

    trainer = trained(folder, config, 6, model=model, kind=Watching, train=rows(24, classes=3))
    assert len(set(seen)) == 6, "the head moves at each step"
    finished(trainer)


@pytest.mark.parametrize("stage", [slow(0), slow(2), slow(3)])
def test_a_classifier_head_that_is_always_active_moves_at_each_step(two_ranks, tmp_path, stage):
    two_ranks.run(assert_head_trains_always, tmp_path, stage)


def assert_two_trainers(folder, stage, same_model):
    config, model = auto_config(stage), small_llama()
    first = trained(folder / "first", config, 6, model=model)
    numel = sum(getattr(param, "ds_numel", param.numel()) for param in model.parameters() if param.requires_grad)
    assert numel == sum(getattr(param, "ds_numel", param.numel()) for param in model.parameters())
    second = trained(folder / "second", config, 6, model=model if same_model else small_llama(1))
    engine = second.model_wrapped
    assert (engine.hift.cycle, engine.hift.active_block) == (1, 0)
    if same_model:
        assert list(LIVING) == [engine], "the first engine has ended"
        assert losses_of(second)[0] < losses_of(first)[0], "it goes on from where the first was"
    else:
        alone = trained(folder / "alone", config, 6, model=small_llama(1))
        assert losses_of(alone) == losses_of(second)
        finished(alone)
        first.model_wrapped.destroy()
    finished(second)


@pytest.mark.parametrize(
    ("stage", "same_model"), [(2, True), (0, False), *map(slow, (0, 2, 3, 3), (True, False, True, False))]
)
def test_two_trainers_after_one_another_each_train_all_blocks(two_ranks, tmp_path, stage, same_model):
    two_ranks.run(assert_two_trainers, tmp_path, stage, same_model)


class Interrupts(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


def assert_trains_after_an_interruption(folder, stage, optimizer, then):
    model, config = small_llama(), auto_config(stage, optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        trained(folder / "first", config, 8, model=model, trainer_takes={"callbacks": [Interrupts()]})
    assert all(param.requires_grad for param in model.parameters())
    forget()
    if then == "plain":
        del config["hift"]
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    before = {name: safe_get_full_fp32_param(param).clone() if stage == 3 else param.detach().clone()
              for name, param in model.named_parameters()}  # fmt: skip
    second = trained(folder / "second", config, 6, model=model)
    assert isinstance(second.model_wrapped, HiFTEngine) == (then == "hift")
    after = whole_weights(second.model_wrapped)
    assert not [name for name in before if torch.equal(before[name], after[name])]
    second.model_wrapped.destroy()


@pytest.mark.parametrize(
    ("stage", "optimizer", "then"),
    [(0, False, "hift"), slow(3, False, "hift"), slow(2, True, "hift"), slow(0, True, "plain")],
)
def test_a_trainer_after_an_interrupted_one_trains_the_whole_model(one_rank, tmp_path, stage, optimizer, then):
    one_rank.run(assert_trains_after_an_interruption, tmp_path, stage, optimizer, then)


def assert_a_block_for_the_model_is_refused():
    model, config = small_llama(), ds_config(0, hift={})
    first = hift_ds.initialize(model=model, config=config)[0]
    del config["optimizer"]
    some = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-3)
    with pytest.raises(ValueError, match=r"optimizer=AdamW: has the \d+ parameters of one block alone.*destroy"):
        hift_ds.initialize(model=model, config=config, optimizer=some)
    first.destroy()
    whole = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-3)
    engine = hift_ds.initialize(model=model, config=config, optimizer=whole)[0]
    assert len(engine.hift.blocks) == 6
    engine.destroy()


def test_an_optimizer_of_the_block_that_an_engine_has_active_is_refused_for_the_whole_model(one_rank):
    one_rank.run(assert_a_block_for_the_model_is_refused)


def assert_zero_init(folder):
    small_llama().save_pretrained(folder / f"base{dist.get_rank()}")
    config = auto_config(3)
    with hift_ds.enable():
        args = arguments(folder, config, STEPS)  # from_pretrained partitions from here on
        model = AutoModelForCausalLM.from_pretrained(folder / f"base{dist.get_rank()}", attn_implementation="eager")
        assert all(hasattr(param, "ds_id") for param in model.parameters())
        trainer = trainer_of(model, args, data())
        trainer.train()
    weights = finished(trainer)
    assert_equal(weights, loop(small_llama(), config, data(), STEPS, micro_steps=1))


def test_a_model_that_from_pretrained_has_partitioned_trains_as_any_other(one_rank, tmp_path):
    one_rank.run(assert_zero_init, tmp_path)


# The callback.


def assert_log(folder, stage):
    trainer = trained(folder, auto_config(stage, optimizer=False), 8)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["hift_block"] for line in lines] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert [line["hift_cycle"] for line in lines] == [0] * 6 + [1] * 2
    rates = [line["hift_lr"] for line in lines]
    assert len(set(rates[:6])) == 1 and len(set(rates[6:])) == 1 and rates[0] > rates[7] > 0
    assert sum(isinstance(callback, HiFTCallback) for callback in trainer.callback_handler.callbacks) == 1
    finished(trainer)
    by_hand = trained(folder, auto_config(stage), 2, trainer_takes={"callbacks": [HiFTCallback()]})
    assert [type(callback) for callback in by_hand.callback_handler.callbacks].count(HiFTCallback) == 1
    finished(by_hand)


def assert_callback_guards(folder):
    args = arguments(folder, auto_config(0) | {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, 2)
    trainer = trainer_of(small_llama(), args, data(), callbacks=[HiFTCallback()])
    with pytest.raises(RuntimeError, match=r"DeepSpeed's own engine would train, in full: call hift_ds.enable\(\)"):
        trainer.train()
    plain = auto_config(0) | {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    del plain["hift"]
    trainer = trainer_of(small_llama(), arguments(folder, plain, 2), data(), callbacks=[HiFTCallback()])
    with messages() as said:
        trainer.train()
    assert "hift_block" not in trainer.state.log_history[0]
    assert sum("this run trains in full" in line for line in said) == 1


def assert_short_run_is_said(folder, steps, said_of):
    with messages() as said:
        finished(trained(folder, auto_config(0), steps))
    assert sum("a cycle through all blocks has 6" in line for line in said) == said_of


def test_a_run_of_fewer_steps_than_a_cycle_says_that_blocks_have_no_turn(one_rank, tmp_path):
    one_rank.run(assert_short_run_is_said, tmp_path / "short", 5, 1)
    one_rank.run(assert_short_run_is_said, tmp_path / "long", 6, 0)


def test_a_callback_without_enable_refuses_a_hift_section_and_leaves_any_other_config(one_rank, tmp_path):
    one_rank.run(assert_callback_guards, tmp_path)


def assert_second_train_is_refused(folder):
    with hift_ds.enable():
        trainer = trained(folder, auto_config(2), 6)
        with pytest.raises(RuntimeError, match="destroy"):
            trainer.train()


def test_a_second_train_of_one_trainer_is_an_error_and_not_a_run_that_trains_nothing(one_rank, tmp_path):
    one_rank.run(assert_second_train_is_refused, tmp_path)


def assert_compiled(folder, stage):
    import torch._dynamo as dynamo

    dynamo.reset()
    config, few = auto_config(stage), {"model": small_llama(layers=2), "gradient_accumulation_steps": 1}
    eager = finished(trained(folder / "eager", config, 9, **few))
    before, dynamo.config.recompile_limit = dynamo.config.recompile_limit, 2
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    try:
        few["model"] = small_llama(layers=2)
        compiled = finished(trained(folder / "compiled", config, 9, torch_compile_backend="aot_eager", **few))
    finally:
        dynamo.config.recompile_limit = before
    assert dynamo.utils.counters["stats"]["unique_graphs"] - graphs >= 4, "each of the four blocks was compiled"
    assert max((eager[name] - compiled[name]).abs().max().item() for name in eager) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_torch_compile_compiles_every_block_and_trains_as_eager(one_rank, tmp_path, stage):
    one_rank.run(assert_compiled, tmp_path, stage, timeout_s=300)


@pytest.mark.parametrize("stage", [0, slow(2), slow(3)])
def test_log_lines_show_block_cycle_and_the_rate_in_force(one_rank, tmp_path, stage):
    one_rank.run(assert_log, tmp_path, stage)


def assert_backward_trains_as_step(folder, stage):
    found = []
    for update in ("step", "backward"):
        config = auto_config(stage, hift={"update": update, "layers_per_block": 100})
        more = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "save_strategy": "steps", "save_steps": 4}
        trainer = trained(folder / update, config, **more)
        found.append((losses_of(trainer), finished(trainer)))
        saved = str(folder / update / "checkpoint-4")
        again = trained(folder / f"{update}-again", config, resume=saved, model=small_llama(1), **more)
        assert_equal(finished(again), found[-1][1])
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("stage", [0, slow(2), slow(3)])
def test_updates_in_backward_train_resume_and_log_as_updates_in_the_step(one_rank, tmp_path, stage):
    one_rank.run(assert_backward_trains_as_step, tmp_path, stage)
