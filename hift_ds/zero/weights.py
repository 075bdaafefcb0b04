"""From a shard of new weights to the model's."""

from __future__ import annotations

import torch
from deepspeed import comm as dist

from hift_ds.shards import BlockShard, is_partitioned


@torch.no_grad()
def write_weights(shard: BlockShard, weights: torch.Tensor, group: object, max_numel: int) -> None:
    """Makes `weights` (1-D, shard length) the model weights, cast to each parameter's dtype.

    Collective over `group` at stages 1 and 2: every rank sends its slices and receives the others', in pieces of at
    most `max_numel` elements. At stage 3 each rank writes its own slices and nothing is sent.
    """
    if is_partitioned(shard.params[0]):
        for index, segment in enumerate(shard.segments):
            shard.weight_slice(index).copy_(weights[segment.offset : segment.offset + segment.numel])
        return
    for bucket in shard.buckets(max_numel):
        mine = weights[shard.span(bucket)].to(shard.params[bucket[0]].dtype)
        shard.unpack(bucket, mine if shard.world == 1 else _all_gathered(mine, shard.world, group))


def _all_gathered(mine: torch.Tensor, world: int, group: object) -> torch.Tensor:
    packed = torch.empty(world * mine.numel(), dtype=mine.dtype, device=mine.device)
    dist.all_gather_into_tensor(packed, mine.contiguous(), group=group)
    return packed
