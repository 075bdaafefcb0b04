"""A classifier on a pretrained model: which topic a question is about.

    python examples/classifier.py

Its head is fresh: it trains at every step, beside the active block.
"""

import argparse

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import hift_ds
from hift_ds.recipes.samples import MINILM, fetch_sample
from hift_ds.recipes.sources import sample_rows

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="folder or hub name; default: MiniLM, 6 layers")
parser.add_argument("--stage", type=int, default=0, help="of ZeRO")
parser.add_argument("--max_steps", type=int, default=200)
parser.add_argument("--output_dir", default="outputs/classifier")
args = parser.parse_args()
on_gpu = torch.cuda.is_available()

hift_ds.enable()  # the one line: deepspeed.initialize honours "hift" from now on
config = {
    "train_micro_batch_size_per_gpu": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "HiFT_AdamW", "params": {"lr": "auto"}},
    "zero_optimization": {"stage": args.stage, "stage3_gather_16bit_weights_on_model_save": True},
    "hift": {"enabled": True},
}
training = TrainingArguments(
    args.output_dir, deepspeed=config, max_steps=args.max_steps, per_device_train_batch_size=8, learning_rate=2e-4,
    warmup_steps=10, bf16=on_gpu, use_cpu=not on_gpu, logging_steps=40,
    save_strategy="no", report_to=[],
)  # fmt: skip
model_name, dtype = args.model or fetch_sample(MINILM), torch.bfloat16 if on_gpu else torch.float32
tokenizer = AutoTokenizer.from_pretrained(model_name)
topics = sorted({row["topic"] for row in sample_rows("hift-faq", "train")})
model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=len(topics), dtype=dtype)
train, held_out = (
    [{**tokenizer(row["question"]), "label": topics.index(row["topic"])} for row in sample_rows("hift-faq", part)]
    for part in ("train", "eval")
)
trainer = Trainer(
    model, training, train_dataset=train, eval_dataset=held_out, data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=lambda found: {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())},
)  # fmt: skip
trainer.train()
print(f"right on held-out questions: {trainer.evaluate()['eval_right']:.0%} of {len(topics)} topics")
