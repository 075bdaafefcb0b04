"""The forecast of the very run that a script is about to make, or has made."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

from deepspeed import comm as dist

from hift_ds.memory.figures import Plan
from hift_ds.memory.plan import Planner
from hift_ds.memory.request import Request


def forecast(
    engine: Any, ds_config: Mapping[str, Any], seq_len: int, checkpointing: bool, padded: bool = True,
    card_bytes: int | None = None, device_type: str | None = None, ends_alone: bool = False,
) -> Plan | str:  # fmt: skip
    """The plan of a run, or why there is none. Not collective.

    Args:
        engine: Of HiFT, or DeepSpeed's own: then with blocks of one layer.
        ds_config: Its config.
        seq_len: Tokens of a row.
        checkpointing: Activations are recomputed.
        padded: Rows have padding.
        card_bytes: Of the card.
        device_type: Of the forecast; `None` = this run's.
        ends_alone: Of the first and the last two blocks alone, which is quick.
    """
    model, hift = engine.module, getattr(engine, "hift_config", None)
    config = copy.deepcopy(dict(ds_config))
    config["hift"] = {**(config.get("hift") or {}), "enabled": True}
    if hift is not None:
        config["hift"]["layers_per_block"] = hift.layers_per_block or 1
    world = dist.get_world_size()
    nodes = max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    attention = getattr(model.config, "_attn_implementation", None)
    request = Request(
        config, seq_len, attention, checkpointing, padded, world // nodes, nodes, card_bytes,
        device_type=device_type or engine.device.type,
    )  # fmt: skip
    try:
        planner = Planner(copy.deepcopy(model.config), type(model))
        return planner.plan_of_ends(request) if ends_alone else planner.plan(request)
    except (ValueError, TypeError) as error:
        return str(error)
