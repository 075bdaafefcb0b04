"""Command line of the launch scripts, and the DeepSpeed config that comes of it."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hift_ds.config.keys import INACTIVE_STATES, KERNELS, LR_UPDATES, ORDERS

# Nothing here imports torch or DeepSpeed at the top: --help is quick, and the number of threads can still be chosen.
_MICRO, _ACCUMULATION, _TRAIN = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"

_HIFT = {
    "layers_per_block": dict(type=int, metavar="M", help="consecutive layers trained together"),
    "order": dict(choices=ORDERS, help="order in which blocks are visited"),
    "seed": dict(type=int, help="draws the random order"),
    "steps_per_block": dict(type=int, metavar="K", help="optimizer steps before the next block's turn"),
    "lr_update": dict(choices=LR_UPDATES, help="when the learning rate changes"),
    "inactive_state": dict(choices=INACTIVE_STATES, help="keep or reset a block's state between its turns"),
    "kernel": dict(choices=KERNELS, help="the update in fused kernels (CUDA) or in plain PyTorch"),
    "frozen": dict(nargs="+", metavar="REGEX", help="parameters that are never trained"),
    "always_active": dict(nargs="+", metavar="REGEX", help="parameters trained at every step"),
}


def add_arguments(parser: argparse.ArgumentParser, default_config: Path) -> None:
    """Adds what all launch scripts share."""
    from hift_ds.recipes.models import SAMPLE

    add = parser.add_argument
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    add("--deepspeed_config", default=str(default_config), metavar="JSON", help="any DeepSpeed config")
    add("--model_name_or_path", default=SAMPLE, metavar="MODEL", help="hub name, folder, or the sample")
    add("--dataset", default="hift-faq", metavar="DATA", help="hift-faq, python-stdlib, file, folder or hub name")
    add("--max_steps", type=positive, default=None, metavar="N", help="optimizer steps (default: three epochs)")
    add("--output_dir", default="outputs/train", metavar="DIR", help="trained model and checkpoints")
    add("--seq_len", type=positive, default=512, metavar="N", help="longest row in tokens")
    add("--pack", action=argparse.BooleanOptionalAction, default=None, help="join examples to full rows")
    add("--micro_batch", type=positive, metavar="N", help="rows per device and forward")
    add("--accumulation", type=positive, metavar="N", help="micro steps per optimizer step")
    add("--lr", type=float, metavar="R", help="learning rate")
    add("--seed", type=int, default=42, help="order of the data")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in backward")
    add("--attn_implementation", metavar="A", help="sdpa, eager, flash_attention_2 ...")
    add("--eval_every", type=positive, metavar="N", help="steps between evaluations (default: before and after)")
    add("--save_every", type=positive, metavar="N", help="steps between checkpoints (default: none)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    add("--tensorboard", action="store_true", help="write TensorBoard events below output_dir")
    add("--verbose", action="store_true", help="show DeepSpeed's own messages")
    group = parser.add_argument_group('HiFT (each overrides the config\'s "hift" section)')
    group.add_argument("--hift", action="store_true", help="rotate blocks; without it: full fine-tuning")
    for key, options in _HIFT.items():
        group.add_argument(f"--hift_{key}", **options)


def build_ds_config(args: argparse.Namespace, max_steps: int | None = None) -> dict[str, Any]:
    """The DeepSpeed config of a run: the file, then the command line.

    Without `--hift` there is no "hift" section, so the same file serves full fine-tuning.

    Raises:
        ValueError: No such file, not JSON, a `--hift_...` option without `--hift`, or a `--lr` that would do nothing.
        TypeError: A "hift" section that is not an object.
    """
    from hift_ds.config.files import load_ds_config

    config = load_ds_config(args.deepspeed_config)
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed_config {args.deepspeed_config!r}: no such file; give a DeepSpeed JSON's path")
    config = copy.deepcopy(config)
    section = config.pop("hift", None) or {}
    overrides = {key: getattr(args, f"hift_{key}") for key in _HIFT if getattr(args, f"hift_{key}") is not None}
    if args.hift and not isinstance(section, Mapping):
        raise TypeError(f'hift={section!r}: must be an object such as {{"layers_per_block": 1}}')
    if args.hift:
        config["hift"] = {**section, "enabled": True, **overrides}
        if config["hift"].get("layers_per_block", 1) is None:
            config["hift"].setdefault("seq_len", args.seq_len)  # else the choice would be for the model's longest rows
    elif overrides:
        raise ValueError(f"--hift_{next(iter(overrides))}: has no effect without --hift; add --hift")
    override_batch(config, args.micro_batch, args.accumulation)
    if args.lr is not None:
        _override_rate(config, args.lr)
    if args.tensorboard:
        config["tensorboard"] = {"enabled": True, "output_path": args.output_dir, "job_name": "tensorboard"}
    if max_steps is not None:
        _fit_schedule(config, max_steps)
    return config


def resolve_batch(config: dict[str, Any], world: int) -> tuple[int, int]:
    """Rows per forward and micro steps per optimizer step, by DeepSpeed's rule train = micro x accumulation x ranks.

    What follows from the sizes given is written into `config`.

    Raises:
        ValueError: Sizes that are missing, no whole numbers of 1 or more, or that contradict each other.
    """
    for key in (_MICRO, _ACCUMULATION, _TRAIN):
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{key}={value!r}: must be a whole number, 1 or more; change the config")
    micro, accumulation, train = (config.get(key) for key in (_MICRO, _ACCUMULATION, _TRAIN))
    if micro is None and train is None:
        raise ValueError(f"{_MICRO}: missing; put it into the config, or pass --micro_batch")
    if micro is None:
        accumulation = accumulation or 1
        micro = train // (accumulation * world)
    elif accumulation is None:
        accumulation = 1 if train is None else train // (micro * world)
    if train is not None and train != micro * accumulation * world:
        raise ValueError(
            f"{_TRAIN}={train}: must be {_MICRO} x {_ACCUMULATION} x {world} ranks, here {micro} x {accumulation} x "
            f"{world}; change one of them, or pass --micro_batch and --accumulation"
        )
    config.update({_MICRO: micro, _ACCUMULATION: accumulation, _TRAIN: micro * accumulation * world})
    return micro, accumulation


def override_batch(config: dict[str, Any], micro: int | None, accumulation: int | None) -> None:
    """Where the config fixes `train_batch_size`, one size given changes the other; both given change the batch."""
    given = {_MICRO: micro, _ACCUMULATION: accumulation}
    if _TRAIN in config and any(given.values()):
        for key in (_TRAIN,) if all(given.values()) else given:
            config.pop(key, None)
    config.update({key: value for key, value in given.items() if value})


def _override_rate(config: dict[str, Any], lr: float) -> None:
    """`--lr`, also where the schedule and not the optimizer says how high the rate goes."""
    config.setdefault("optimizer", {"type": "AdamW"}).setdefault("params", {})["lr"] = lr
    scheduler = config.get("scheduler") or {}
    if scheduler.get("type") in ("OneCycle", "LRRangeTest"):
        raise ValueError(f"--lr {lr}: has no effect on scheduler.type={scheduler['type']!r}; change its params instead")
    if "warmup_max_lr" in (scheduler.get("params") or {}):
        scheduler["params"]["warmup_max_lr"] = lr


def _fit_schedule(config: dict[str, Any], max_steps: int) -> None:
    """Ends the schedule with the run, and its warm-up within the first tenth."""
    params = (config.get("scheduler") or {}).get("params") or {}
    if "total_num_steps" in params:
        params["total_num_steps"] = max(max_steps, 2)
        if "warmup_num_steps" in params:
            params["warmup_num_steps"] = max(1, min(params["warmup_num_steps"], max_steps // 10))


def positive(text: str) -> int:
    """An argparse type: an integer, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value
