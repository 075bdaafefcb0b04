"""Chat data with TRL's SFTTrainer, packed, with its loss in chunks.

    python examples/sft_chat.py
    torchrun --nproc_per_node 2 examples/sft_chat.py --stage 2
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hift_ds
from hift_ds.recipes.samples import fetch_sample
from hift_ds.recipes.sources import sample_rows

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="folder or hub name; default: SmolLM2-135M")
parser.add_argument("--stage", type=int, default=0, help="of ZeRO")
parser.add_argument("--max_steps", type=int, default=24)
parser.add_argument("--output_dir", default="outputs/sft_chat")
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
training = SFTConfig(
    args.output_dir, deepspeed=config, max_steps=args.max_steps, per_device_train_batch_size=2, learning_rate=1e-4,
    max_length=128, packing=True, gradient_checkpointing=False, bf16=on_gpu,
    use_cpu=not on_gpu, logging_steps=4, save_strategy="no", report_to=[],
)  # fmt: skip
model_name, dtype = args.model or fetch_sample(), torch.bfloat16 if on_gpu else torch.float32


def chats(part):
    return Dataset.from_list([
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in sample_rows("hift-faq", part)
    ])  # fmt: skip


trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype), training, train_dataset=chats("train"),
    eval_dataset=chats("eval"), processing_class=AutoTokenizer.from_pretrained(model_name),
)  # fmt: skip
trainer.train()
print(f"held-out loss {trainer.evaluate()['eval_loss']:.3f}")
trainer.save_model()
