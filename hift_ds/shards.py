"""The one shard layout of a block: how its parameters are cut over the ranks, and how whole tensors are laid out so.

Each parameter is cut into `world` equal slices of ceil(numel / world) elements, as ZeRO-3 does (the last one padded). A
block's *shard* on rank r is slice r of each of its parameters, each in a slot rounded up to `ALIGNMENT` elements, those
of one param group side by side (a *run*), so that an update is one pass over a few long, aligned ranges. Stage 0 is the
case world = 1; stages 1, 2 and 3 share layout, update, state and checkpoint.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import TypeIs

    class Stage3Parameter(torch.nn.Parameter):
        """What ZeRO-3 adds to a parameter, whose class stays `torch.nn.Parameter`."""

        ds_tensor: torch.Tensor  # this rank's slice, padded
        ds_active_sub_modules: set[int]
        all_gather: Callable[[], Any]
        partition: Callable[[], Any]
        _z3_optimizer: Any

ALIGNMENT = 16  # elements: lets Triton prove 128-bit alignment for 16- and 32-bit buffers
STAGE3_ATTRIBUTES = ("ds_numel", "ds_shape", "ds_tensor")  # of a ZeRO-3 parameter (partition_parameters.py)


def slice_numel(numel: int, world: int) -> int:
    """Elements of a rank's slice of a parameter, the last one's padding included."""
    return -(-numel // world)


@dataclass(frozen=True)
class Segment:
    """One parameter's slice inside a run of a block's shard."""

    fqn: str
    shape: torch.Size  # of the whole parameter
    start: int  # first element of this rank's slice in the flattened parameter
    numel: int  # valid elements in the slice (0 possible), padding excluded
    offset: int  # where the slice begins in the 1-D tensors passed to update()
    padded_numel: int  # elements that the slice occupies there; the rest is padding: master 0, gradient 0


@dataclass(frozen=True)
class Run:
    """A range of a shard whose parameters share one param group; segment offsets count from `start`."""

    group: int
    start: int
    stop: int
    segments: tuple[Segment, ...]


class UnitShard:
    """Where each parameter of one block lies in this rank's shard.

    Args:
        params: (name, parameter) pairs in the block's order; ZeRO-3 parameters are partitioned placeholders.
        group_of: Param group index by name.
        world: Ranks that share the block's state (1 at stage 0); every one holds an equal slot of each parameter.
        rank: This rank among them.
    """

    def __init__(
        self, params: Sequence[tuple[str, torch.nn.Parameter]], group_of: dict[str, int], world: int, rank: int
    ) -> None:
        self.world, self.rank = world, rank
        ordered = sorted(params, key=lambda pair: group_of[pair[0]])  # stable: the block's order within a group
        self.fqns = tuple(fqn for fqn, _ in ordered)
        self.params = tuple(param for _, param in ordered)
        self.segments: list[Segment] = []
        offset = 0
        for fqn, param in ordered:
            numel, shape = full_numel(param), full_shape(param)
            each = slice_numel(numel, world)
            start = min(rank * each, numel)
            slot = -(-each // ALIGNMENT) * ALIGNMENT
            valid = min(each, numel - start)
            self.segments.append(Segment(fqn, shape, start, valid, offset, slot))
            offset += slot
        self.numel = offset
        self.position = {param: index for index, param in enumerate(self.params)}
        self.runs = self._make_runs(group_of)

    def _make_runs(self, group_of: dict[str, int]) -> tuple[Run, ...]:
        runs = []
        for group in sorted({group_of[fqn] for fqn in self.fqns}):
            members = [segment for segment in self.segments if group_of[segment.fqn] == group]
            start, last = members[0].offset, members[-1]
            relative = tuple(
                Segment(m.fqn, m.shape, m.start, m.numel, m.offset - start, m.padded_numel) for m in members
            )
            runs.append(Run(group, start, last.offset + last.padded_numel, relative))
        return tuple(runs)

    @property
    def dtype(self) -> torch.dtype:
        """The model weights'; fp32 where a block mixes dtypes."""
        dtypes = {param.dtype for param in self.params}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def buckets(self, max_numel: int) -> list[range]:
        """Consecutive segments of one dtype, the last first, as backward produces them.

        Each has at most `max_numel` elements over all ranks, but one segment at least.
        """
        result, stop = [], len(self.segments)
        while stop:
            first, total = stop - 1, self.segments[stop - 1].padded_numel * self.world
            while first and total + self.segments[first - 1].padded_numel * self.world <= max_numel:
                if self.params[first - 1].dtype != self.params[first].dtype:
                    break
                first -= 1
                total += self.segments[first].padded_numel * self.world
            result.append(range(first, stop))
            stop = first
        return result

    def span(self, bucket: range) -> slice:
        """The elements of the shard that a bucket covers."""
        last = self.segments[bucket[-1]]
        return slice(self.segments[bucket[0]].offset, last.offset + last.padded_numel)

    def pack(self, bucket: range, tensors: Sequence[torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor:
        """Lays whole tensors (`None` = zeros) of a bucket out rank by rank.

        Returns:
            1-D, `world` times the bucket's span: rank r's slots are the r-th part. Padding is 0.
        """
        device = next((t.device for t in tensors if t is not None), self.params[bucket[0]].device)
        span = self.span(bucket)
        packed = torch.zeros(self.world, span.stop - span.start, dtype=dtype, device=device)
        for index, tensor in zip(bucket, tensors, strict=True):
            if tensor is not None:
                self._scatter_into(packed, index, span.start, tensor.reshape(-1))
        return packed.view(-1)

    def _scatter_into(self, packed: torch.Tensor, index: int, base: int, flat: torch.Tensor) -> None:
        segment = self.segments[index]
        each = slice_numel(flat.numel(), self.world)
        column = segment.offset - base
        whole = flat.numel() // each if each else 0
        packed[:whole, column : column + each].copy_(flat[: whole * each].view(whole, each))
        rest = flat[whole * each :]
        if rest.numel():
            packed[whole, column : column + rest.numel()].copy_(rest)

    def unpack(self, bucket: range, packed: torch.Tensor) -> None:
        """The inverse of `pack`: writes the whole parameters of a bucket (stages 0-2)."""
        span = self.span(bucket)
        packed = packed.view(self.world, span.stop - span.start)
        for index in bucket:
            segment, target = self.segments[index], self.params[index].data.view(-1)
            each = slice_numel(target.numel(), self.world)
            column = segment.offset - span.start
            whole = target.numel() // each if each else 0
            rows = packed[:whole, column : column + each]
            target[: whole * each].view(whole, each).copy_(rows)
            rest = target.numel() - whole * each
            if rest:
                target[whole * each :].copy_(packed[whole, column : column + rest])

    def weight_slice(self, index: int) -> torch.Tensor:
        """This rank's valid elements of a parameter's model weights, a 1-D view (stage 3: of `ds_tensor`)."""
        param, segment = self.params[index], self.segments[index]
        if is_partitioned(param):
            return param.ds_tensor.data.view(-1)[: segment.numel]
        return param.data.view(-1)[segment.start : segment.start + segment.numel]

    def weight_pieces(self, span: slice) -> Iterator[tuple[slice, torch.Tensor]]:
        """This rank's model weights in a range of the shard: elements of the range, and a 1-D view of the weights."""
        for index, first, last in pieces(self.segments, span.start, span.stop - span.start):
            start = self.segments[index].offset
            yield slice(first - span.start, last - span.start), self.weight_slice(index)[first - start : last - start]

    def tiles(self, numel: int) -> Iterator[tuple[int, slice]]:
        """Ranges of the shard of at most `numel` elements, each with the index of its run."""
        for index, run in enumerate(self.runs):
            for start in range(run.start, run.stop, numel):
                yield index, slice(start, min(start + numel, run.stop))

    def parts(self, tile: slice, group: int) -> Iterator[slice]:
        """A range of the shard in ranges of one parameter each, but for `group` elements around where two meet.

        Each begins a multiple of `group` after the tile's own beginning.
        """
        edges = {tile.start, tile.stop}
        for _, *ends in pieces(self.segments, tile.start, tile.stop - tile.start):
            for end in ends:
                low = tile.start + (end - tile.start) // group * group
                edges |= {low, low if low == end else min(low + group, tile.stop)}
        return itertools.starmap(slice, itertools.pairwise(sorted(edges)))

    @torch.no_grad()
    def read_weights(self, out: torch.Tensor) -> torch.Tensor:
        """Copies this rank's slices of the model weights into `out` (1-D, shard length, any dtype or device)."""
        for index, segment in enumerate(self.segments):
            slot = out[segment.offset : segment.offset + segment.padded_numel]
            slot[: segment.numel].copy_(self.weight_slice(index))
            slot[segment.numel :].zero_()
        return out


def pieces(segments: Sequence[Segment], start: int, numel: int) -> Iterator[tuple[int, int, int]]:
    """Which part of a tile that begins at `start` of a run belongs to which segment.

    Yields:
        Index of the segment, first and last + 1 element of the run.
    """
    begin = max(bisect_right(segments, start, key=lambda segment: segment.offset) - 1, 0)
    for index in range(begin, len(segments)):
        segment = segments[index]
        if segment.offset >= start + numel:
            return
        first, last = max(segment.offset, start), min(segment.offset + segment.numel, start + numel)
        if first < last:
            yield index, first, last


def full_numel(param: torch.nn.Parameter) -> int:
    """Elements of the whole parameter, partitioned or not."""
    return getattr(param, "ds_numel", param.numel())


def full_shape(param: torch.Tensor) -> torch.Size:
    """Its shape, likewise."""
    return torch.Size(getattr(param, "ds_shape", param.shape))


def is_partitioned(param: torch.nn.Parameter) -> TypeIs[Stage3Parameter]:
    """True for a ZeRO-3 parameter."""
    return hasattr(param, "ds_id")
