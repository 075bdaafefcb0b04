"""ZeRO-3's memory of which modules run in which order: one for each block."""

from __future__ import annotations

from typing import Any


class Traces:
    """Gives DeepSpeed's parameter manager the coordinator of the block that trains.

    ZeRO-3 records which modules run in which order and prefetches by it. Each block has a trace of its own (its
    backward stops elsewhere); one coordinator for all would throw its trace away again and again top-down.

    Args:
        offload: DeepSpeed's DeepSpeedZeRoOffload, with `new_coordinator`.
    """

    def __init__(self, offload: Any) -> None:
        self._offload = offload
        self._coordinators: dict[int, Any] = {}
        self._numbering = offload.module.ds_id

    def enter(self, block: int) -> None:
        """From now on `block` trains, or goes on to."""
        if self._offload.module.ds_id != self._numbering:
            # Hooks were taken off and put on again (unwrap_model_for_generation): modules have new numbers.
            self.forget()
            self._numbering = self._offload.module.ds_id
        if block not in self._coordinators:
            self._coordinators[block] = self._offload.new_coordinator()
        self._offload.param_coordinator = self._coordinators[block]

    def forget(self) -> None:
        """All are recorded anew."""
        self._coordinators.clear()
