"""Preferences with TRL's DPOTrainer; the reference model stays DeepSpeed's own.

    python examples/dpo.py
    torchrun --nproc_per_node 2 examples/dpo.py --stage 2
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import hift_ds
from hift_ds.recipes.samples import fetch_sample
from hift_ds.recipes.sources import sample_rows

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="folder or hub name; default: SmolLM2-135M")
parser.add_argument("--stage", type=int, default=0, help="of ZeRO")
parser.add_argument("--max_steps", type=int, default=8)
parser.add_argument("--output_dir", default="outputs/dpo")
args = parser.parse_args()
on_gpu = torch.cuda.is_available()

hift_ds.enable()  # the one line: deepspeed.initialize honours "hift" from now on
config = {
    "train_micro_batch_size_per_gpu": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "HiFT_AdamW", "params": {"lr": "auto"}},
    "zero_optimization": {"stage": args.stage, "stage3_gather_16bit_weights_on_model_save": True},
    "hift": {"enabled": True, "layers_per_block": 8},
}
training = DPOConfig(
    args.output_dir, deepspeed=config, max_steps=args.max_steps, per_device_train_batch_size=2, learning_rate=1e-5,
    max_length=96, gradient_checkpointing=False, bf16=on_gpu,
    use_cpu=not on_gpu, logging_steps=4, save_strategy="no", report_to=[],
)  # fmt: skip
model_name, dtype = args.model or fetch_sample(), torch.bfloat16 if on_gpu else torch.float32
rows = sample_rows("hift-faq", "train")
pairs = Dataset.from_list([  # each question with its answer, and with that of another question
    {
        "prompt": [{"role": "user", "content": row["question"]}],
        "chosen": [{"role": "assistant", "content": row["answer"]}],
        "rejected": [{"role": "assistant", "content": other["answer"]}],
    }
    for row, other in zip(rows, rows[50:] + rows[:50], strict=True)
])  # fmt: skip
model, reference = (AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype) for _ in range(2))
trainer = DPOTrainer(
    model, reference, training, train_dataset=pairs, processing_class=AutoTokenizer.from_pretrained(model_name)
)
trainer.train()
last = [line["rewards/accuracies"] for line in trainer.state.log_history if "rewards/accuracies" in line][-1]
print(f"the right answer is preferred in {last:.0%} of the last pairs")
