"""Requests of the planner: what the options of `hift-ds plan` ask for, and the very run that a script makes."""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed import comm as dist

from hift_ds.compiled_layers import require_stage_without_hooks
from hift_ds.config.batch import MICRO, TRAIN
from hift_ds.config.resolve import set_precision, set_stage
from hift_ds.memory.figures import Forecast
from hift_ds.memory.model_names import load_config
from hift_ds.memory.planner import Planner
from hift_ds.memory.request import Request, parse_bytes
from hift_ds.memory.timing import CARDS, Speeds
from hift_ds.recipes.arguments import check_pairs, loss_tile_of, override_batch, read_ds_config
from hift_ds.recipes.auto import without_auto
from hift_ds.recipes.models import source_of
from hift_ds.state.unit_state import card_bytes


def request_of(args: argparse.Namespace) -> Request:
    """What the options ask for; a config may be one for the Trainer, with "auto" in it.

    Raises:
        ValueError, TypeError: An option, or a key of the config, that cannot be.
    """
    source: dict[str, Any] | None = None
    assumed: list[str] = []
    if args.deepspeed_config is not None:
        source, assumed = without_auto(
            read_ds_config(args.deepspeed_config), args.precision, args.stage, args.micro_batch,
            lambda: load_config(source_of(args.model)),
        )  # fmt: skip
    check_pairs(args)
    config = complete_config(source, args.precision, args.stage, args.micro_batch, args.gpus * args.nodes)
    if args.layers_per_block is not None:
        config["hift"]["layers_per_block"] = args.layers_per_block
    if args.optimizer is not None:
        config["optimizer"] = {"type": args.optimizer}
    card: int | None
    if args.gpu_memory is not None:
        card = parse_bytes(args.gpu_memory, "--gpu_memory")
    else:
        card = _card_here() if args.card is None else CARDS[args.card].memory
    host = None if args.host_memory is None else parse_bytes(args.host_memory, "--host_memory")
    request = Request(
        config, args.seq_len, args.attn_implementation, args.gradient_checkpointing, args.padded, args.gpus, args.nodes,
        card, host, checkpoint_frozen=args.checkpoint_frozen == "yes", keep_layers=args.keep_layers,
        loss_tile=loss_tile_of(args), compiled=args.compile,
    )  # fmt: skip
    if request.compiled:
        require_stage_without_hooks(request.config.stage)
    for note in (*assumed, *request.config.notes):
        print(f"DeepSpeed config: {note}", file=sys.stderr)
    return request


def speeds_of(args: argparse.Namespace) -> Speeds | None:
    """Of the card that is named, and those that are given in the place of its own; `None` without a card.

    Raises:
        ValueError: A speed is given, and no card.
    """
    if args.card is None:
        if args.bus_gb_per_s is not None or args.tflops is not None:
            given = "--tflops" if args.bus_gb_per_s is None else "--bus_gb_per_s"
            raise ValueError(f"{given}: a step's seconds need --card, too, for its memory; name the nearest")
        return None
    card = CARDS[args.card]
    return Speeds(
        card.bus if args.bus_gb_per_s is None else args.bus_gb_per_s * 1e9,
        card.products if args.tflops is None else args.tflops * 1e12, card.bandwidth,
    )  # fmt: skip


def _card_here() -> int | None:
    if not torch.cuda.is_available():
        return None
    return card_bytes(torch.device("cuda", 0))


def complete_config(
    ds_config: Mapping[str, Any] | None, precision: str | None, stage: int | None, micro_batch: int | None, world: int
) -> dict[str, Any]:
    """A DeepSpeed config as a forecast takes it. Without one: AdamW, bf16, ZeRO-2 (one rank: 0).

    With HiFT on, and one row a rank where nothing is said.

    Args:
        precision, stage, micro_batch: Instead of the config's; `None` = as it is.
        world: Ranks.
    """
    stage_by_default = {"stage": 2 if world > 1 else 0}
    default = {"optimizer": {"type": "AdamW"}, "bf16": {"enabled": True}, "zero_optimization": stage_by_default}
    config: dict[str, Any] = copy.deepcopy(default if ds_config is None else dict(ds_config))
    if precision is not None:
        set_precision(config, precision)
    if stage is not None:
        set_stage(config, stage)
    override_batch(config, micro_batch, None)
    if TRAIN not in config:
        config.setdefault(MICRO, 1)
    section = config.setdefault("hift", {"enabled": True})
    if section is None or (isinstance(section, Mapping) and section.get("enabled") is False):
        config["hift"] = {**(section or {}), "enabled": True}  # planned as if it were on
    return config


def forecasts_of_run(
    engine: Any, ds_config: Mapping[str, Any], seq_len: int, *device_types: str, padded: bool = True,
    ends_alone: bool = False,
) -> list[Forecast] | str:  # fmt: skip
    """The forecast of a run for each of `device_types`, or why there is none. Not collective.

    Args:
        engine: Of HiFT, or DeepSpeed's own: then with blocks of one layer.
        ds_config: Its config.
        seq_len: Tokens of a row.
        padded: Rows have padding.
        ends_alone: Of the first and the last two blocks alone, which is quick.
    """
    world, hift = dist.get_world_size(), getattr(engine, "hift_config", None)
    config = complete_config(ds_config, None, None, None, world)
    if hift is not None:
        config["hift"]["layers_per_block"] = hift.layers_per_block or 1
        config["hift"]["always_active"] = list(hift.always_active)
    nodes = max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    try:
        planner = Planner.of(engine.module)
        make = planner.forecast_of_ends if ends_alone else planner.forecast
        return [
            make(Request.of(
                engine.module, config, seq_len, padded=padded, gpus=world // nodes, nodes=nodes,
                gpu_memory=card_bytes(engine.device),  # or the part of it that a limit leaves
                device_type=device_type,
            ))
            for device_type in device_types
        ]  # fmt: skip
    except (ValueError, TypeError) as error:
        return str(error)
