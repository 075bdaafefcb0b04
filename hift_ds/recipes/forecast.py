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
from hift_ds.state.block_state import card_bytes


def forecast(
    engine: Any, ds_config: Mapping[str, Any], seq_len: int, padded: bool = True, device_type: str | None = None,
    ends_alone: bool = False,
) -> Plan | str:  # fmt: skip
    """The memory plan of a run, or why there is none. Not collective.

    Args:
        engine: Of HiFT, or DeepSpeed's own: then with blocks of one layer.
        ds_config: Its config.
        seq_len: Tokens of a row.
        padded: Rows have padding.
        device_type: Of the forecast; `None` = this run's.
        ends_alone: Of the first and the last two blocks alone, which is quick.
    """
    config, hift = copy.deepcopy(dict(ds_config)), getattr(engine, "hift_config", None)
    config["hift"] = {**(config.get("hift") or {}), "enabled": True}
    if hift is not None:
        config["hift"]["layers_per_block"] = hift.layers_per_block or 1
    world = dist.get_world_size()
    nodes = max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    request = Request.of(
        engine.module, config, seq_len, padded=padded, gpus=world // nodes, nodes=nodes,
        gpu_memory=card_bytes(engine.device),  # or the part of it that a limit leaves
        device_type=device_type or engine.device.type,
    )  # fmt: skip
    try:
        planner = Planner.of(engine.module)
        return planner.plan_of_ends(request) if ends_alone else planner.plan(request)
    except (ValueError, TypeError) as error:
        return str(error)
