"""transformers' Trainer on a tiny model, and the loop with `hift_ds.initialize` that it must equal."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from deepspeed import comm as dist
from hift_testing.training import VOCAB, whole_weights
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import hift_ds

ROWS = 2  # of a rank's micro batch
ADAMW = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}
AUTO = {name: "auto" for name in ADAMW}


def rows(count: int, classes: int | None = None) -> list[dict[str, Any]]:
    """Rows of 4 to 12 tokens, the same everywhere; labels are the tokens, or one of `classes`."""
    draw = random.Random(0)
    made = []
    for _ in range(count):
        ids = [draw.randrange(3, VOCAB) for _ in range(draw.randint(4, 12))]
        made.append({"input_ids": ids, "labels": list(ids) if classes is None else draw.randrange(classes)})
    return made


def collate(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded to the longest row; padding is no label."""
    width = max(len(row["input_ids"]) for row in some)
    ids, mask, labels = [], [], []
    for row in some:
        gap = width - len(row["input_ids"])
        ids.append(row["input_ids"] + [0] * gap)
        mask.append([1] * len(row["input_ids"]) + [0] * gap)
        labels.append(row["labels"] + [-100] * gap if isinstance(row["labels"], list) else row["labels"])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def auto_config(stage: int, optimizer: bool = True, hift: dict[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
    """A DeepSpeed config as Trainer takes it: what Trainer knows is "auto". `optimizer`: or Trainer's own."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "steps_per_print": None,
        "zero_optimization": {
            "stage": stage, "stage3_param_persistence_threshold": 100,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "hift": {"enabled": True, **(hift or {})},
    }  # fmt: skip
    if optimizer:
        config["optimizer"] = {"type": "HiFT_AdamW", "params": dict(AUTO)}
    return {**config, **extra}


def forget() -> None:
    """What accelerate and transformers keep of a run for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def arguments(
    folder: Any, config: dict[str, Any], steps: int, kind: type = TrainingArguments, **more: Any
) -> TrainingArguments:
    """Cosine with warm-up, clipping; nothing is saved or reported unless asked for."""
    forget()
    settings = {
        "per_device_train_batch_size": ROWS, "per_device_eval_batch_size": ROWS, "max_steps": steps,
        "learning_rate": ADAMW["lr"], "adam_beta1": ADAMW["betas"][0], "adam_beta2": ADAMW["betas"][1],
        "adam_epsilon": ADAMW["eps"], "weight_decay": ADAMW["weight_decay"], "lr_scheduler_type": "cosine",
        "warmup_steps": 2, "max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "seed": 3, "remove_unused_columns": False,
    }  # fmt: skip
    return kind(output_dir=str(folder), deepspeed=config, **{**settings, **more})


class Ordered(Trainer):
    """Takes rows in their order, and computes on them as a loop would."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def trainer_of(model: torch.nn.Module, args: TrainingArguments, data: Any, kind: type = Ordered, **more: Any) -> Any:
    """A Trainer on `data`."""
    return kind(model=model, args=args, train_dataset=data, data_collator=collate, **more)


def losses_of(trainer: Any) -> list[float]:
    """Of each logged step."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def loop(
    model: torch.nn.Module, config: dict[str, Any], data: list[dict[str, Any]], steps: int, *, micro_steps: int,
    bf16: bool = False, optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer] | None = None,
    windows: list[int] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The run of `arguments` by hand: the same batches, losses and schedule; returns whole weights. Collective.

    Args:
        windows: Micro steps of each step, where they differ; `None` = `micro_steps` of each.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    config = {
        **config, "train_micro_batch_size_per_gpu": ROWS, "gradient_accumulation_steps": micro_steps,
        "train_batch_size": ROWS * micro_steps * world, "gradient_clipping": 0.5, "bf16": {"enabled": bf16},
    }  # fmt: skip
    if "optimizer" in config:
        config["optimizer"] = {"type": "AdamW", "params": ADAMW}
    engine, *_ = hift_ds.initialize(
        model=model, config=config, optimizer=optimizer,
        lr_scheduler=lambda holder: transformers.get_scheduler("cosine", holder, 2, steps),
    )  # fmt: skip
    engine.train()
    mine = itertools.cycle([collate(data[at : at + ROWS]) for at in range(ROWS * rank, len(data), ROWS * world)])
    for length in windows or [micro_steps] * steps:
        window = list(itertools.islice(mine, length))
        items = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in window)
        dist.all_reduce(items)
        for number, batch in enumerate(window, 1):
            if windows is not None:
                engine.set_gradient_accumulation_boundary(number == length)
            loss = engine(**batch, num_items_in_batch=items).loss * world
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()
    weights = whole_weights(engine)
    engine.destroy()
    return weights


def decay_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that Trainer makes: norms and biases do not decay."""
    kept = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    plain = [param for name, param in kept if "norm" in name or "bias" in name]
    decayed = [param for name, param in kept if not ("norm" in name or "bias" in name)]
    groups = [{"params": decayed, "weight_decay": ADAMW["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=ADAMW["lr"], betas=tuple(ADAMW["betas"]), eps=ADAMW["eps"])


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same whole weights, bit for bit."""
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name].float(), right[name].float())] == []
