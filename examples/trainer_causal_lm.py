"""A causal language model with transformers' Trainer.

    python examples/trainer_causal_lm.py
    torchrun --nproc_per_node 2 examples/trainer_causal_lm.py --stage 2
"""

import argparse

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import hift_ds
from hift_ds.recipes.samples import fetch_sample
from hift_ds.recipes.sources import sample_rows

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="folder or hub name; default: SmolLM2-135M")
parser.add_argument("--stage", type=int, default=0, help="of ZeRO")
parser.add_argument("--max_steps", type=int, default=24)
parser.add_argument("--output_dir", default="outputs/trainer_causal_lm")
args = parser.parse_args()
on_gpu = torch.cuda.is_available()

hift_ds.enable()  # the one line: deepspeed.initialize honours "hift" from now on
config = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "HiFT_AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "zero_optimization": {"stage": args.stage, "stage3_gather_16bit_weights_on_model_save": True},
    "hift": {"enabled": True, "layers_per_block": 8},
}
training = TrainingArguments(
    args.output_dir, deepspeed=config, max_steps=args.max_steps, per_device_train_batch_size=4, learning_rate=1e-4,
    lr_scheduler_type="cosine", warmup_steps=2, bf16=on_gpu, use_cpu=not on_gpu, logging_steps=4, save_strategy="no",
    report_to=[],
)  # fmt: skip
model_name, dtype = args.model or fetch_sample(), torch.bfloat16 if on_gpu else torch.float32
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype)


def tokens(part):
    texts = [f"{row['question']}\n{row['answer']}{tokenizer.eos_token}" for row in sample_rows("hift-faq", part)]
    return [tokenizer(text, truncation=True, max_length=96) for text in texts]


collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, training, collator, train_dataset=tokens("train"), eval_dataset=tokens("eval"))
trainer.train()
print(f"held-out loss {trainer.evaluate()['eval_loss']:.3f}")
trainer.save_model()
