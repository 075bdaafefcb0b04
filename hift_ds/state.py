"""Master weights and optimizer state of one block's shard, at home on the host.

On a CPU run host and device are the same memory and nothing is copied. On an accelerator the tensors are pinned, come
to the device tile by tile for the update and go back; the copies are ordered by the device's current stream.
"""

from __future__ import annotations

import logging

import torch

from hift_ds.rules import Rule
from hift_ds.shards import BlockShard

logger = logging.getLogger(__name__)


def host_empty(numel: int, pin: bool) -> torch.Tensor:
    """An fp32 host tensor; pageable, with a warning, where pinning fails (`ulimit -l`)."""
    if pin:
        try:
            return torch.empty(numel, dtype=torch.float32, pin_memory=True)
        except RuntimeError as error:
            logger.warning("pinning %d MiB of host memory failed (%s): transfers will be slower", numel >> 18, error)
    return torch.empty(numel, dtype=torch.float32)


class BlockState:
    """State of one block: `master` (absent where the model weights are fp32 and so their own master), one tensor per
    slot of the update rule, small extra tensors, and `step`, the number of this block's updates.

    Bytes on the host per element of the shard: 4 for the master unless the weights are fp32, and 4 per slot.

    Args:
        shard: The block's layout.
        rule: The update rule.
        param_groups: The hyper-parameter holder's param groups.
        device: Where updates run.
        resident: Keep the state on the device (always-active parameters).
        copies: Treat host and device as separate memories; `None` = unless the device is the CPU.
        pin_memory: Page-lock the host copies on a CUDA machine.
    """

    def __init__(
        self,
        shard: BlockShard,
        rule: Rule,
        param_groups: list[dict],
        device: torch.device,
        resident: bool = False,
        copies: bool | None = None,
        pin_memory: bool = True,
    ) -> None:
        self.shard, self.rule, self.device = shard, rule, device
        self._groups = param_groups
        apart = device.type != "cpu" if copies is None else copies
        self.copies = apart and not resident
        pin = pin_memory and self.copies and device.type == "cuda"

        def new() -> torch.Tensor:
            if resident:
                return torch.empty(shard.numel, dtype=torch.float32, device=device)
            return host_empty(shard.numel, pin)

        self.master = None
        if any(param.dtype != torch.float32 for param in shard.params):
            self.master = shard.read_weights(new())
        names = {slot: None for run in shard.runs for slot in rule.slots(param_groups[run.group])}
        self.slots = {name: new() for name in names}
        self.extra: dict[str, torch.Tensor] = {}
        self.step = 0
        self.reset()

    def reset(self) -> None:
        """Forgets moments and step count; the master weights stay."""
        self.step = 0
        self.extra = {}
        for run in self.shard.runs:
            group = self._groups[run.group]
            for name, tensor in self.slots.items():
                tensor[run.start : run.stop].fill_(self.rule.initial_value(name, group))
            self.extra.update(self.rule.init_extra(run.segments, group))

    def refresh_master(self) -> None:
        """Takes the master weights anew from the model weights."""
        if self.master is not None:
            self.shard.read_weights(self.master)

    def load(self, tensor: torch.Tensor, tile: slice) -> torch.Tensor:
        """A tile of `master` or of a slot on the device, to be changed in place and given to `store`."""
        part = tensor[tile]
        return part.to(self.device, non_blocking=True, copy=True) if self.copies else part

    def store(self, tensor: torch.Tensor, tile: slice, value: torch.Tensor) -> None:
        """Takes a changed tile back."""
        if self.copies:
            tensor[tile].copy_(value, non_blocking=True)

    @property
    def host_bytes(self) -> int:
        """Bytes that this state keeps on the host (0 for a resident one on an accelerator)."""
        return sum(tensor.nbytes for tensor in self.tensors() if tensor.device.type == "cpu")

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the state."""
        masters = [] if self.master is None else [self.master]
        return masters + list(self.slots.values()) + list(self.extra.values())
