"""Batch sizes by DeepSpeed's rule: train = micro x accumulation x ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MICRO, ACCUMULATION, TRAIN = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"


def batch_sizes(ds_config: Mapping[str, Any], world: int) -> tuple[int, int]:
    """Rows of a rank's forward, and micro steps of an optimizer step.

    Raises:
        ValueError: Sizes that are missing, no whole numbers of 1 or more, or that contradict each other.
    """
    for key in (MICRO, ACCUMULATION, TRAIN):
        value = ds_config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{key}={value!r}: must be a whole number, 1 or more; change the config")
    micro, accumulation, train = (ds_config.get(key) for key in (MICRO, ACCUMULATION, TRAIN))
    if micro is None:
        if train is None:
            raise ValueError(f"{MICRO}: missing; put it into the config (in the scripts: --micro_batch)")
        accumulation = accumulation or 1
        micro = train // (accumulation * world)
    elif accumulation is None:
        accumulation = 1 if train is None else train // (micro * world)
    if train is not None and train != micro * accumulation * world:
        raise ValueError(
            f"{TRAIN}={train}: must be {MICRO} x {ACCUMULATION} x {world} ranks, here {micro} x {accumulation} x "
            f"{world}; change one of them (in the scripts: --micro_batch and --accumulation)"
        )
    return micro, accumulation
