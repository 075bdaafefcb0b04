"""From an update's new weights to the model's."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch
from deepspeed import comm as dist

from hift_ds.shards import UnitShard


class NewWeights(Protocol):
    """Takes the new model weights of one unit's shard, range by range."""

    dtype: torch.dtype

    def begin(self, span: slice, read: bool) -> torch.Tensor:
        """Where a range's go, 1-D, perhaps the model's own; `read`: the present ones are in it."""

    def end(self, span: slice, new: torch.Tensor) -> None:
        """They are there, or in another tensor, perhaps on the host."""


class OwnWeights:
    """Of a rank that nobody waits for (a lone one, stage 0, stage 3): each range goes to the model at once."""

    def __init__(self, shard: UnitShard, device: torch.device) -> None:
        self._shard, self._device, self.dtype = shard, device, shard.dtype

    def begin(self, span: slice, read: bool) -> torch.Tensor:
        """As NewWeights.begin: the model's own where one parameter fills the range."""
        numel, present = span.stop - span.start, list(self._shard.weight_pieces(span))
        for _, weights in present:
            here = weights.device.type == self._device.type  # not offloaded
            if here and weights.numel() == numel and weights.dtype == self.dtype:
                return weights
        new = torch.empty(numel, dtype=self.dtype, device=self._device)
        if read:
            new.zero_()  # padding
            for part, weights in present:
                new[part].copy_(weights)
        return new

    def end(self, span: slice, new: torch.Tensor) -> None:
        """As NewWeights.end."""
        for part, weights in self._shard.weight_pieces(span):
            if weights.data_ptr() != new[part].data_ptr():
                weights.copy_(new[part], non_blocking=True)


class SentWeights:
    """Of a rank that sends them to others: the shard's are kept until `Publication.send`."""

    def __init__(self, shard: UnitShard, device: torch.device) -> None:
        self.dtype = shard.dtype
        self._shard, self._read = shard, False
        self.shard = torch.empty(shard.numel, dtype=shard.dtype, device=device)

    def begin(self, span: slice, read: bool) -> torch.Tensor:
        """As NewWeights.begin."""
        if read and not self._read:
            self._read = True
            self._shard.read_weights(self.shard)
        return self.shard[span]

    def end(self, span: slice, new: torch.Tensor) -> None:
        """As NewWeights.end."""
        if new.data_ptr() != self.shard[span].data_ptr():
            self.shard[span].copy_(new, non_blocking=True)


class Publication:
    """Sends new weights to the other ranks; what is on its way arrives at the latest at `wait`.

    Args:
        group: The process group of the ranks that share a unit's state.
        max_numel: Most elements, over all ranks, that are sent at once.
        device: Where the model is.
        sends: Whether there is anything to send (`ResolvedConfig.sends_weights`).
    """

    def __init__(self, group: object, max_numel: int, device: torch.device, sends: bool) -> None:
        self._group, self._max_numel, self._device, self._sends = group, max_numel, device, sends
        self._in_flight: deque[tuple[Any, UnitShard, range, torch.Tensor, torch.Tensor]] = deque()

    def of(self, shard: UnitShard) -> OwnWeights | SentWeights:
        """What takes the new weights of a unit."""
        return SentWeights(shard, self._device) if self._sends else OwnWeights(shard, self._device)

    @torch.no_grad()
    def send(self, shard: UnitShard, new: OwnWeights | SentWeights, in_flight: int) -> None:
        """Makes what `new` has taken the model's on every rank. Collective where the ranks do not have their own.

        Args:
            in_flight: Pieces of at most `max_numel` elements that may still be on their way afterwards.
        """
        if isinstance(new, OwnWeights):
            return
        for bucket in shard.buckets(self._max_numel):
            mine = new.shard[shard.span(bucket)].to(shard.params[bucket[0]].dtype).contiguous()
            self.wait(max(in_flight - 1, 0))
            packed = mine.new_empty(shard.world * mine.numel())
            handle = dist.all_gather_into_tensor(packed, mine, group=self._group, async_op=True)
            self._in_flight.append((handle, shard, bucket, packed, mine))
            self.wait(in_flight)

    @torch.no_grad()
    def wait(self, in_flight: int = 0) -> None:
        """Until no more pieces than that are on their way."""
        while len(self._in_flight) > in_flight:
            handle, shard, bucket, packed, _ = self._in_flight.popleft()
            handle.wait()
            shard.unpack(bucket, packed)
