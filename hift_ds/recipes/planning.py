"""From the options of `hift-ds plan` to a request."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from typing import Any

import torch

from hift_ds.config.ds_keys import check_ds_config
from hift_ds.config.files import load_ds_config
from hift_ds.config.keys import HiFTConfig
from hift_ds.memory.request import Request, parse_bytes, zero_section
from hift_ds.recipes.arguments import override_batch, resolve_batch


def request_of(args: argparse.Namespace) -> Request:
    """What the options ask for.

    Raises:
        ValueError, TypeError: An option, or a key of the config, that cannot be.
    """
    source = None
    if args.deepspeed_config is not None:
        source = load_ds_config(args.deepspeed_config)
        if not isinstance(source, dict):
            raise ValueError(f"--deepspeed_config {args.deepspeed_config!r}: no such file; name a DeepSpeed JSON")
    config = complete_config(source, args.precision, args.stage, args.micro_batch, args.gpus * args.nodes)
    if args.layers_per_block is not None:
        config["hift"]["layers_per_block"] = args.layers_per_block
    check_ds_config(config)
    sizes: dict[str, Any] = {}
    for name in ("gpu_memory", "host_memory"):
        text = getattr(args, name)
        try:
            sizes[name] = None if text is None else parse_bytes(text)
        except ValueError as error:
            raise ValueError(f"--{name} {error}") from None
    if sizes["gpu_memory"] is None:
        sizes["gpu_memory"] = _card_here()
    return Request(
        config, args.seq, args.attn, args.activation_checkpointing, args.padded, args.gpus, args.nodes,
        sizes["gpu_memory"], sizes["host_memory"],
    )  # fmt: skip


def _card_here() -> int | None:
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def complete_config(
    ds_config: Mapping[str, Any] | None, precision: str | None, stage: int | None, micro_batch: int | None, world: int
) -> dict[str, Any]:
    """A DeepSpeed config with everything that a plan needs: what is missing is AdamW, bf16, HiFT, one row a rank.

    Raises:
        ValueError, TypeError: Batch sizes that contradict each other; a bad "hift" section.
    """
    config: dict[str, Any] = copy.deepcopy(dict(ds_config or {}))
    config.setdefault("optimizer", {"type": "AdamW", "params": {}})
    if precision is not None or ds_config is None:
        for key in ("bf16", "bfloat16", "fp16"):
            config.pop(key, None)
        if precision != "fp32":
            config[precision or "bf16"] = {"enabled": True}
    config["zero_optimization"] = zero_section(config)
    if stage is not None:
        config["zero_optimization"]["stage"] = stage
    elif ds_config is None:
        config["zero_optimization"]["stage"] = 2 if world > 1 else 0
    override_batch(config, micro_batch, None)
    if "train_batch_size" not in config:
        config.setdefault("train_micro_batch_size_per_gpu", 1)
    resolve_batch(config, world)
    section = config.get("hift")
    if section is None or isinstance(section, Mapping):
        config["hift"] = {**(section or {}), "enabled": True}
    HiFTConfig.from_ds_config(config)
    return config
