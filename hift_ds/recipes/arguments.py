"""Command line of the launch scripts, and the DeepSpeed config that comes of it."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from hift_ds.config import INACTIVE_STATES, LR_UPDATES, ORDERS
from hift_ds.launching import load_ds_config
from hift_ds.recipes.models import SAMPLE

_HIFT = {
    "layers_per_block": dict(type=int, metavar="M", help="consecutive layers trained together"),
    "order": dict(choices=ORDERS, help="order in which blocks are visited"),
    "seed": dict(type=int, help="draws the random order"),
    "steps_per_block": dict(type=int, metavar="K", help="optimizer steps before the next block's turn"),
    "lr_update": dict(choices=LR_UPDATES, help="when the learning rate changes"),
    "inactive_state": dict(choices=INACTIVE_STATES, help="keep or reset a block's state between its turns"),
    "frozen": dict(nargs="+", metavar="REGEX", help="parameters that are never trained"),
    "always_active": dict(nargs="+", metavar="REGEX", help="parameters trained at every step"),
}


def add_arguments(parser: argparse.ArgumentParser, default_config: Path) -> None:
    """Adds what all launch scripts share."""
    add = parser.add_argument
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    add("--deepspeed_config", default=str(default_config), metavar="JSON", help="any DeepSpeed config")
    add("--model_name_or_path", default=SAMPLE, metavar="MODEL", help="hub name, folder, or the sample")
    add("--dataset", default="hift-faq", metavar="DATA", help="hift-faq, python-stdlib, file, folder or hub name")
    add("--max_steps", type=_positive, default=None, metavar="N", help="optimizer steps (default: three epochs)")
    add("--output_dir", default="outputs/train", metavar="DIR", help="trained model and checkpoints")
    add("--seq_len", type=_positive, default=512, metavar="N", help="longest row in tokens")
    add("--pack", action=argparse.BooleanOptionalAction, default=None, help="join examples to full rows")
    add("--micro_batch", type=_positive, metavar="N", help="rows per device and forward")
    add("--accumulation", type=_positive, metavar="N", help="micro steps per optimizer step")
    add("--lr", type=float, metavar="R", help="learning rate")
    add("--seed", type=int, default=42, help="order of the data")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in backward")
    add("--attn_implementation", metavar="A", help="sdpa, eager, flash_attention_2 ...")
    add("--eval_every", type=_positive, metavar="N", help="steps between evaluations (default: before and after)")
    add("--save_every", type=_positive, metavar="N", help="steps between checkpoints (default: none)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    add("--tensorboard", action="store_true", help="write TensorBoard events below output_dir")
    add("--verbose", action="store_true", help="show DeepSpeed's own messages")
    group = parser.add_argument_group("HiFT (each overrides the config's \"hift\" section)")
    group.add_argument("--hift", action="store_true", help="rotate blocks; without it: full fine-tuning")
    for key, options in _HIFT.items():
        group.add_argument(f"--hift_{key}", **options)


def build_ds_config(args: argparse.Namespace, max_steps: int | None = None) -> dict[str, Any]:
    """The DeepSpeed config of a run: the file, then the command line.

    Without `--hift` there is no "hift" section, so the same file serves full fine-tuning.

    Raises:
        ValueError: No such file, not JSON, or a `--hift_...` option without `--hift`.
    """
    config = load_ds_config(args.deepspeed_config)
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed_config {args.deepspeed_config!r}: no such file; give the path of a DeepSpeed JSON")
    config = copy.deepcopy(config)
    section = config.pop("hift", {})
    overrides = {key: getattr(args, f"hift_{key}") for key in _HIFT if getattr(args, f"hift_{key}") is not None}
    if args.hift:
        config["hift"] = {**section, "enabled": True, **overrides}
    elif overrides:
        raise ValueError(f"--hift_{next(iter(overrides))}: has no effect without --hift; add --hift")
    if args.micro_batch:
        config["train_micro_batch_size_per_gpu"] = args.micro_batch
    if args.accumulation:
        config["gradient_accumulation_steps"] = args.accumulation
    if args.micro_batch or args.accumulation:
        config.pop("train_batch_size", None)
    if args.lr is not None:
        config.setdefault("optimizer", {"type": "AdamW"}).setdefault("params", {})["lr"] = args.lr
    if args.tensorboard:
        config["tensorboard"] = {"enabled": True, "output_path": args.output_dir, "job_name": "tensorboard"}
    if max_steps is not None:
        _fit_schedule(config, max_steps)
    return config


def _fit_schedule(config: dict[str, Any], max_steps: int) -> None:
    """Ends the schedule with the run, and its warm-up within the first tenth."""
    params = config.get("scheduler", {}).get("params", {})
    if "total_num_steps" in params:
        params["total_num_steps"] = max(max_steps, 2)
        if "warmup_num_steps" in params:
            params["warmup_num_steps"] = max(1, min(params["warmup_num_steps"], max_steps // 10))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value
