"""What the engine tells the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hift_ds.state.block_state import Storage
from hift_ds.state.formats import Form
from hift_ds.state.host_memory import HostMemory


@dataclass(frozen=True)
class Settings:
    """What the engine tells the optimizer; DeepSpeed's keys where there is one.

    Attributes:
        stage: ZeRO stage.
        world: Ranks of the data-parallel group.
        clip: `gradient_clipping`, the largest global norm of the active block's gradient; 0 = off.
        publish_numel: `allgather_bucket_size`.
        reset_state: `inactive_state: reset`.
        kernel: `torch` or `triton`, which implementation updates the active block.
        form: `hift.state.master` and `hift.state.moments`.
        resident: `hift.state.residency: device`.
        ring_bytes: `hift.state.ring_bytes`.
        pin_memory: Page-lock the host's copies.
        on_host: Update on the host (`offload_optimizer.device: cpu` on a machine with an accelerator).
        separate_host: Treat host and device as separate memories; `None` = unless the device is the CPU.
        seed: `hift.seed`.
        no_gradient: `hift.no_gradient`.
        card_bytes: Of the card's memory, by which null chooses the ring; `None` on a CPU.
    """

    stage: int
    world: int
    clip: float
    publish_numel: int
    reset_state: bool
    kernel: str = "torch"
    form: Form = field(default_factory=Form)
    resident: bool = False
    ring_bytes: int | None = None
    pin_memory: bool = True
    on_host: bool = False
    separate_host: bool | None = None
    seed: int = 0
    no_gradient: str = "error"
    card_bytes: int | None = None

    def storage(self, device: torch.device) -> Storage:
        """Of the blocks' state."""
        apart = device.type != "cpu" if self.separate_host is None else self.separate_host
        if self.resident or not apart:
            return Storage(device, self.form)
        pinned = self.pin_memory and device.type == "cuda"
        return Storage(device, self.form, HostMemory.pinned() if pinned else HostMemory(), own_master=self.on_host)


def card_bytes(device: torch.device) -> int | None:
    """Bytes of the card's memory, or of its part where `set_per_process_memory_fraction` sets one; `None` on a CPU."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


def offload_optimizer(ds_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`zero_optimization.offload_optimizer`, or what its old name means; empty if there is none."""
    zero = ds_config.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return {}
    if zero.get("cpu_offload"):  # the old name
        return {"device": "cpu"}
    section = zero.get("offload_optimizer")
    return section if isinstance(section, Mapping) else {}


def updates_on_host(ds_config: Mapping[str, Any]) -> bool:
    """Whether `offload_optimizer.device` is `cpu`."""
    return offload_optimizer(ds_config).get("device") == "cpu"
