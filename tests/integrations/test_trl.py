"""TRL with `hift_ds.enable()`: every block trains, reference models stay DeepSpeed's own."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from deepspeed import comm as dist
from hift_testing.selection import slow
from hift_testing.trainers import auto_config, forget, losses_of
from hift_testing.training import whole_weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import hift_ds
from hift_ds.engine import HiFTEngine

pytestmark = pytest.mark.multi_rank
WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", *map(str, range(40))]
SAID = "{{ m['role'] + ' ' + m['content'] }} <eos> "
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}" + SAID + "{% endgeneration %}"
    "{% else %}" + SAID + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
STEPS = 7  # of five blocks


def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT
    )


def llama(kind=LlamaForCausalLM, **more):
    torch.manual_seed(0)
    return kind(LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=1, **more,
    ))  # fmt: skip


def message(role, number):
    return {"role": role, "content": " ".join(str((number * step + step) % 40) for step in range(1, 6))}


def chats():
    return Dataset.from_list([
        {"messages": [message("user", at), message("assistant", at + 1)]} for at in range(16)
    ])  # fmt: skip


def preferences(folder):
    """On disk, where TRL keeps for all ranks what one has computed in advance."""
    if dist.get_rank() == 0:
        Dataset.from_list([
            {"prompt": [message("user", at)], "chosen": [message("assistant", at)],
             "rejected": [message("assistant", at + 7)]}
            for at in range(16)
        ]).save_to_disk(folder / "rows")  # fmt: skip
    dist.barrier()
    return Dataset.load_from_disk(folder / "rows")


def settings(folder, kind, stage, hift=None, optimizer=True, **more):
    given = {
        "per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": 1e-2, "logging_steps": 1, "bf16": False,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    config = auto_config(stage, optimizer, hift)
    return kind(output_dir=str(folder), deepspeed=config, **{**given, **more})


def assert_all_blocks_train(trainer, before, still=()):
    """After a cycle and a little every parameter has moved; what `before` holds is whole."""
    trainer.train()
    engine = trainer.model_wrapped
    assert isinstance(engine, HiFTEngine)
    assert engine.hift.cycle == STEPS // len(engine.hift.blocks)
    after = whole_weights(engine)
    kept = {name for name in after if torch.equal(after[name], before[name].to(after[name].dtype))}
    assert kept == set(still)
    assert all(map(torch.isfinite, map(torch.tensor, losses_of(trainer))))
    engine.destroy()


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


SFT = {
    "chat": {},
    "packed": {"packing": True, "max_length": 32},
    "nll": {"loss_type": "nll"},
    "answers": {"assistant_only_loss": True},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


def assert_sft(folder, stage, variant, hift=None, still=()):
    forget()
    model = llama()
    before = weights(model)
    with hift_ds.enable():
        args = settings(folder, SFTConfig, stage, hift, **SFT[variant])
        trainer = SFTTrainer(model, args, train_dataset=chats(), processing_class=tokenizer())
        assert_all_blocks_train(trainer, before, still)
    losses = losses_of(trainer)
    assert min(losses[3:]) < losses[0]


@pytest.mark.parametrize(
    ("variant", "stage"),
    [("chat", 2), ("packed", 3), *(slow(name, stage) for name in SFT for stage in (0, 2, 3)
                                   if (name, stage) not in (("chat", 2), ("packed", 3)))],
)  # fmt: skip
def test_sft_trains_every_block(two_ranks, tmp_path, variant, stage):
    two_ranks.run(assert_sft, tmp_path, stage, variant)


@pytest.mark.parametrize("stage", [slow(0), slow(2), 3])
def test_sft_s_loss_in_chunks_trains_beside_a_frozen_head(two_ranks, tmp_path, stage):
    two_ranks.run(assert_sft, tmp_path, stage, "chat", {"frozen": ["^lm_head"]}, ["lm_head.weight"])


def assert_chunked_is_plain(folder, stage):
    forget()
    found = []
    for loss_type in ("nll", "chunked_nll"):
        model = llama()
        with hift_ds.enable():
            args = settings(folder, SFTConfig, stage, loss_type=loss_type)
            trainer = SFTTrainer(model, args, train_dataset=chats(), processing_class=tokenizer())
            trainer.train()
        found.append(whole_weights(trainer.model_wrapped))
        trainer.model_wrapped.destroy()
    left, right = found
    assert max((left[name] - right[name]).abs().max().item() for name in left) < 2e-4, "of steps of 1e-2"


@pytest.mark.parametrize("stage", [slow(0), slow(2), slow(3)])
def test_sft_s_loss_in_chunks_gives_the_weights_of_the_plain_loss(one_rank, tmp_path, stage):
    one_rank.run(assert_chunked_is_plain, tmp_path, stage)


def assert_dpo(folder, stage, precompute, optimizer):
    forget()
    model = llama()
    before = weights(model)
    with hift_ds.enable():
        args = settings(folder, DPOConfig, stage, optimizer=optimizer, precompute_ref_log_probs=precompute, beta=0.5)
        trainer = DPOTrainer(model, None if precompute else llama(), args, train_dataset=preferences(folder),
                             processing_class=tokenizer())  # fmt: skip
        if not precompute:
            assert not isinstance(trainer.ref_model, HiFTEngine)
        assert_all_blocks_train(trainer, before)


@pytest.mark.parametrize(
    ("stage", "precompute", "optimizer"),
    [(2, False, True), slow(3, False, True), slow(0, True, False), slow(0, False, True),
     slow(2, True, True), slow(3, True, True), slow(3, False, False)],
)  # fmt: skip
def test_dpo_trains_every_block_and_leaves_the_reference_alone(two_ranks, tmp_path, stage, precompute, optimizer):
    two_ranks.run(assert_dpo, tmp_path, stage, precompute, optimizer)


def count_sevens(completions, **_):
    return [float(sum(word == "7" for word in str(text).split())) for text in completions]


def assert_grpo(folder, stage):
    forget()
    llama().save_pretrained(folder / "base")  # from where TRL takes the reference
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    before = weights(model)
    prompts = Dataset.from_list([{"prompt": f"user {at}"} for at in range(16)])
    with hift_ds.enable():
        args = settings(
            folder, GRPOConfig, stage, num_generations=4, per_device_train_batch_size=4, max_completion_length=6,
            beta=0.1, temperature=1.5,
        )  # fmt: skip
        trainer = GRPOTrainer(model, count_sevens, args, train_dataset=prompts, processing_class=tokenizer())
        assert not isinstance(trainer.ref_model, HiFTEngine)
        assert_all_blocks_train(trainer, before)


@pytest.mark.parametrize("stage", [slow(0), slow(2), 3])
def test_grpo_generates_and_trains_every_block(one_rank, tmp_path, stage):
    one_rank.run(assert_grpo, tmp_path, stage)


def assert_reward(folder, stage):
    forget()
    model = llama(LlamaForSequenceClassification, num_labels=1)
    before = weights(model)
    with hift_ds.enable():
        args = settings(folder, RewardConfig, stage, {"always_active": ["^score"]})
        trainer = RewardTrainer(model, args, train_dataset=preferences(folder), processing_class=tokenizer())
        assert_all_blocks_train(trainer, before)


@pytest.mark.parametrize("stage", [slow(0), slow(2), slow(3)])
def test_a_reward_model_trains_every_block(two_ranks, tmp_path, stage):
    two_ranks.run(assert_reward, tmp_path, stage)
