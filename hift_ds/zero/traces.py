"""ZeRO-3's memory of which modules run in which order: one for each block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hift_ds.shards import is_partitioned


class Traces:
    """Gives DeepSpeed's parameter manager the coordinator of the block that trains.

    ZeRO-3 records which modules run in which order and prefetches by it. Each block has a trace of its own (its
    backward stops elsewhere); one coordinator for all would throw its trace away again and again top-down.

    A trace is stale, and ZeRO-3 then raises, when modules have been numbered anew (hooks taken off and put on again, as
    `unwrap_model_for_generation` does), or when a module has come to use a parameter of another one, which ZeRO-3 finds
    in a forward that meets it partitioned. Each forward, of the engine or of the module itself, begins with that check.

    Args:
        offload: DeepSpeed's DeepSpeedZeRoOffload, with `new_coordinator`.
    """

    def __init__(self, offload: Any) -> None:
        self._offload = offload
        self._coordinators: dict[int, Any] = {}
        self._block, self._signature = 0, self._present()
        # Before DeepSpeed's own, which begins to follow the trace.
        self._hook = offload.module.register_forward_pre_hook(lambda *_: self._refresh(), prepend=True)

    def enter(self, block: int) -> None:
        """From now on `block` trains."""
        self._block = block
        self._refresh()

    def forget(self) -> None:
        """All are recorded anew."""
        self._coordinators.clear()
        self._refresh()

    def end(self) -> None:
        """Takes the hook off."""
        self._hook.remove()

    def _present(self) -> tuple[int, int]:
        module = self._offload.module
        return module.ds_id, sum(len(getattr(part, "_external_params", ())) for part in module.modules())

    def _refresh(self) -> None:
        present = self._present()
        if present != self._signature:
            self._signature = present
            self._coordinators.clear()
        if self._block not in self._coordinators:
            self._coordinators[self._block] = self._offload.new_coordinator()
        self._offload.param_coordinator = self._coordinators[self._block]
        leave_inference_mode(self._offload.module.parameters())


def leave_inference_mode(params: Iterable[torch.nn.Parameter]) -> None:
    """Outside of it: what stage 3 has gathered or released in a forward under it can require gradients again."""
    if not torch.is_inference_mode_enabled():
        for param in params:
            if param.is_inference():
                param.data = param.data.clone()


def partition_all(offload: Any) -> None:
    """Releases whatever ZeRO-3 has gathered of its module. Collective."""
    params = list(offload.module.parameters())
    if all(map(is_partitioned, params)):
        offload.partition_all_parameters()
        return
    for param in filter(is_partitioned, params):  # the user has put others there since, on which it would stumble
        param.ds_active_sub_modules.clear()
        param.partition()
