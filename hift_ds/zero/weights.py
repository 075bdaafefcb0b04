"""From a shard of new weights to the model's."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from deepspeed import comm as dist

from hift_ds.shards import UnitShard, is_partitioned


class Publication:
    """Writes new weights into the model; what is on its way to other ranks arrives at the latest at `wait`.

    Args:
        group: The process group of the ranks that share a unit's state.
        max_numel: Most elements, over all ranks, that are sent at once.
    """

    def __init__(self, group: object, max_numel: int) -> None:
        self._group, self._max_numel = group, max_numel
        self._in_flight: deque[tuple[Any, UnitShard, range, torch.Tensor, torch.Tensor]] = deque()

    @torch.no_grad()
    def write(self, shard: UnitShard, weights: torch.Tensor, in_flight: int) -> None:
        """Makes `weights` (1-D, shard length) the model weights, cast to each parameter's dtype.

        Collective at stages 1 and 2: every rank sends its slices and receives the others', in pieces of at most
        `max_numel` elements. At stage 3 each rank writes its own slices and nothing is sent.

        Args:
            in_flight: Pieces that may still be on their way afterwards.
        """
        if is_partitioned(shard.params[0]):
            for index, segment in enumerate(shard.segments):
                shard.weight_slice(index).copy_(weights[segment.offset : segment.offset + segment.numel])
            return
        for bucket in shard.buckets(self._max_numel):
            mine = weights[shard.span(bucket)].to(shard.params[bucket[0]].dtype)
            if shard.world == 1:
                shard.unpack(bucket, mine)
                continue
            self.wait(max(in_flight - 1, 0))
            mine, packed = mine.contiguous(), mine.new_empty(shard.world * mine.numel())
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
