"""Command line of the launch scripts, and the DeepSpeed config that comes of it."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import Field
from functools import partial
from pathlib import Path
from typing import Any

from hift_ds.config.batch import ACCUMULATION, MICRO, TRAIN
from hift_ds.config.keys import HiFTConfig, StateConfig
from hift_ds.config.kinds import Kind, declared, default_of

LOSSES = ("plain", "chunked")
CARD_NAMES = ("rtx3090", "rtx4090", "rtx5090", "a6000", "a100-80gb", "h100", "h200")
# Nothing here imports torch or DeepSpeed at the top: --help is quick, and the number of threads can still be chosen.

def add_arguments(parser: argparse.ArgumentParser, default_config: Path) -> None:
    """Adds what all launch scripts share."""
    from hift_ds.recipes.models import SAMPLE

    add = parser.add_argument
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    add("--deepspeed_config", default=str(default_config), metavar="JSON", help="any DeepSpeed config")
    add("--model_name_or_path", default=SAMPLE, metavar="MODEL", help="hub name, folder, or the sample")
    add("--dataset", default="hift-faq", metavar="DATA", help="hift-faq, hift-facts, file, folder or hub name")
    add("--max_steps", type=positive, default=None, metavar="N", help="optimizer steps (default: three epochs)")
    add("--output_dir", default="outputs/train", metavar="DIR", help="trained model and checkpoints")
    add("--seq_len", type=positive, default=512, metavar="N", help="longest row in tokens")
    add("--pack", action=argparse.BooleanOptionalAction, default=None, help="join examples to full rows")
    add("--micro_batch", type=positive, metavar="N", help="rows per device and forward")
    add("--accumulation", type=positive, metavar="N", help="micro steps per optimizer step")
    add("--lr", type=float, metavar="R", help="learning rate")
    add("--seed", type=int, default=42, help="order of the data")
    add_activations(parser)
    add("--compile", action="store_true", help="compile the layers' parts with torch.compile, ZeRO 0 to 2")
    add("--attn_implementation", metavar="A", help="sdpa, eager, flash_attention_2 ...")
    add("--eval_every", type=positive, metavar="N", help="steps between evaluations (default: before and after)")
    add("--answers", type=positive, default=1, metavar="N", help="held-out questions to answer after training")
    add("--answer_tokens", type=positive, default=48, metavar="N", help="longest answer in tokens")
    add("--measure_memory", action="store_true", help="measure the peak of the training's steps")
    add("--save_every", type=positive, metavar="N", help="steps between checkpoints (default: none)")
    add("--keep_last", type=positive, metavar="N", help="checkpoints that are kept, the newest (default: all)")
    add("--save_on_signal", action="store_true", help="SIGTERM: save, and leave with exit code 0")
    add("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    add("--allow_changed", action="store_true", help="resume though the config or the options are others now")
    add("--tensorboard", action="store_true", help="write TensorBoard events below output_dir")
    add("--verbose", action="store_true", help="show DeepSpeed's own messages")
    group = parser.add_argument_group('HiFT (each overrides the config\'s "hift" section)')
    group.add_argument("--hift", action="store_true", help="rotate blocks; without it: full fine-tuning")
    for option, path, part in _hift_options():
        kind, default = part.metadata["kind"], default_of(part)
        words = f"{part.metadata['description']} ({kind.allowed}; default: {default})"
        words = words.replace("%", "%%").replace("`", "")
        many: dict[str, Any] = {"nargs": "+", "metavar": "REGEX"} if kind.several else {"metavar": part.name.upper()}
        parse = str if kind.several else partial(_parsed, kind, "hift." + ".".join(path))
        group.add_argument(f"--{option}", type=parse, default=argparse.SUPPRESS, help=words, **many)


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """What a measurement has beside the options of a training run."""
    add = parser.add_argument
    add("--random", action="store_true", help="random weights from the model's config.json, and random tokens")
    add("--gpu_memory_limit", metavar="SIZE",
        help="cap the allocator: a bigger card shows what fits on less; 22GiB for a card of 24 GB")  # fmt: skip
    add("--skip_evaluation", action="store_true", help="no held-out loss before and after")
    add("--results", metavar="FILE", help="where the result goes (default: a dated file in launch/results)")


def add_activations(parser: argparse.ArgumentParser) -> None:
    """Of training and of its forecast: what is kept for backward."""
    add = parser.add_argument
    add("--gradient_checkpointing", action="store_true", help="recompute activations in backward")
    add("--keep_layers", type=positive, default=0, metavar="K",
        help="with --gradient_checkpointing: the last K layers keep their activations, which is faster")  # fmt: skip
    add("--loss", choices=LOSSES, default=LOSSES[0], help="chunked: head and cross entropy tile by tile, no logits")
    add("--loss_tile", metavar="SIZE",
        help="with --loss chunked: of logits at a time, in fp32 (default: 64MiB); wider is faster")  # fmt: skip


def check_pairs(args: argparse.Namespace) -> None:
    """Raises ValueError where an option of `add_activations` has nothing to say."""
    if args.keep_layers and not args.gradient_checkpointing:
        raise ValueError(f"--keep_layers {args.keep_layers}: goes with --gradient_checkpointing; give both or neither")
    loss_tile_of(args)


def loss_tile_of(args: argparse.Namespace) -> int | None:
    """Bytes of a tile of the loss; `None`: the plain loss.

    Raises:
        ValueError: No size, or a size for the plain loss.
    """
    from hift_ds.chunked_loss import TILE_BYTES
    from hift_ds.memory.request import parse_bytes

    if args.loss_tile is None:
        return TILE_BYTES if args.loss == "chunked" else None
    if args.loss == "plain":
        raise ValueError(f"--loss_tile {args.loss_tile}: goes with --loss chunked; give both or neither")
    return parse_bytes(args.loss_tile, "--loss_tile")


def add_trace_argument(parser: argparse.ArgumentParser) -> None:
    """Of the benchmark that times steps."""
    parser.add_argument("--trace", action="store_true",
        help="on a CUDA device: up to 8 steps more under the profiler: what copies nothing hid")  # fmt: skip


def _hift_options() -> Iterator[tuple[str, tuple[str, ...], Field]]:
    """Option, place in the section, and declaration of every key."""
    for part in declared(HiFTConfig):
        if part.name == "state":
            for inner in declared(StateConfig):
                yield f"hift_state_{inner.name}", ("state", inner.name), inner
        elif part.name != "enabled":
            yield f"hift_{part.name}", (part.name,), part


def _parsed(kind: Kind, key: str, text: str) -> Any:
    """An argparse type: the value as JSON has it, a string without its quotes too."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    try:
        kind.check(key, value)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def build_ds_config(args: argparse.Namespace, max_steps: int | None = None) -> dict[str, Any]:
    """The DeepSpeed config of a run: the file, then the command line.

    Without `--hift` there is no "hift" section, so the same file serves full fine-tuning.

    Raises:
        ValueError: No such file, not JSON, a `--hift_...` option without `--hift`, or a `--lr` that would do nothing.
        TypeError: A "hift" section that is not an object.
    """
    config = copy.deepcopy(read_ds_config(args.deepspeed_config))
    section = config.pop("hift", None) or {}
    overrides = {path: vars(args)[option] for option, path, _ in _hift_options() if option in vars(args)}
    if args.hift and not isinstance(section, Mapping):
        raise TypeError(f'hift={section!r}: must be an object such as {{"layers_per_block": 1}}')
    if args.hift:
        config["hift"] = {**section, "enabled": True}
        for path, value in overrides.items():
            inner = config["hift"] if len(path) == 1 else _inner_section(config["hift"], path[0])
            inner[path[-1]] = value
        if ("blocks",) in overrides and ("layers_per_block",) not in overrides:
            config["hift"].pop("layers_per_block", None)  # the file's, which the command line's blocks replace
        if config["hift"].get("layers_per_block", 1) is None:
            config["hift"].setdefault("seq_len", args.seq_len)  # else the choice would be for the model's longest rows
    elif overrides:
        raise ValueError(f"--hift_{'_'.join(next(iter(overrides)))}: has no effect without --hift; add --hift")
    override_batch(config, args.micro_batch, args.accumulation)
    if args.lr is not None:
        _override_rate(config, args.lr)
    if args.tensorboard:
        config["tensorboard"] = {"enabled": True, "output_path": args.output_dir, "job_name": "tensorboard"}
    if max_steps is not None:
        _fit_schedule(config, max_steps)
    return config


def read_ds_config(source: str) -> dict[str, Any]:
    """The value of `--deepspeed_config`.

    Raises:
        ValueError: No such file, or not JSON.
    """
    from hift_ds.config.files import load_ds_config

    config = load_ds_config(source)
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed_config {source!r}: no such file; name a DeepSpeed JSON")
    return config


def _inner_section(section: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(section.get(name) or {}, Mapping):
        raise TypeError(f"hift.{name}={section[name]!r}: must be null or an object")
    section[name] = dict(section.get(name) or {})
    return section[name]


def override_batch(config: dict[str, Any], micro: int | None, accumulation: int | None) -> None:
    """Where the config fixes `train_batch_size`, one size given changes the other; both given change the batch."""
    given = {MICRO: micro, ACCUMULATION: accumulation}
    if TRAIN in config and any(given.values()):
        for key in (TRAIN,) if all(given.values()) else given:
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


def above_nothing(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return value


def positive(text: str) -> int:
    """An argparse type: an integer, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1")
    return int(text)
