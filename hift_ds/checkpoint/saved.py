"""What a checkpoint has of a parameter, read by range of the flattened parameter, whichever ranks have written it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from hift_ds.checkpoint.content import PHASES, REMAINDER
from hift_ds.checkpoint.tensor_files import CODES
from hift_ds.state.formats import GROUP, SCALE_SUFFIX, decode_int8, join_split16

RANGE = 1 << 24  # elements of a parameter that are converted at a time


class Tensors(Protocol):
    """The tensors of one rank and one part of the model."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Beside the tensors."""

    def __contains__(self, name: str) -> bool: ...

    def code(self, name: str) -> str:
        """Of a tensor's dtype, as safetensors have it."""

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Elements of a tensor, flattened."""


class Held:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        self._tensors, self.metadata = tensors, dict(metadata)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def code(self, name: str) -> str:
        """As Tensors.code."""
        return CODES[self._tensors[name].dtype]

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """As Tensors.read."""
        return self._tensors[name].reshape(-1)[first:last]


class Saved:
    """A checkpoint that has been checked.

    Args:
        manifest: Its facts (`content.facts`).
        tensors: Those of a rank and a part; part "" = the rest of what is a rank's own.
    """

    def __init__(self, manifest: Mapping[str, Any], tensors: Callable[[int, str], Tensors]) -> None:
        self.manifest = manifest
        self.parameters: Mapping[str, Mapping[str, Any]] = manifest["parameters"]
        self.plain: bool = manifest.get("plain", False)  # of DeepSpeed, without HiFT
        self._tensors = tensors

    def slices(self, fqn: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Rank, first and last element of its slice, for the ranks that have a range of a parameter."""
        each = self.parameters[fqn]["slice"] if fqn in self.parameters else self.manifest["frozen"][fqn]
        while start < stop:
            rank = start // each
            last = min(stop, (rank + 1) * each)
            yield rank, start - rank * each, last - rank * each
            start = last

    def stored(self, fqn: str, suffix: str, start: int, stop: int) -> torch.Tensor:
        """A range of a tensor that is cut as the parameter, in the dtype that it has in the file."""
        part = self.parameters[fqn]["file"]
        return _joined(
            [self._tensors(rank, part).read(fqn + suffix, *place) for rank, *place in self.slices(fqn, start, stop)]
        )

    def master(self, fqn: str, start: int, stop: int) -> torch.Tensor:
        """A range of the master weight in fp32."""
        weight = self.stored(fqn, "", start, stop)
        if self.parameters[fqn]["master"] == "split16" and weight.numel():
            return join_split16(weight, self.stored(fqn, REMAINDER, start, stop))
        return weight.float()

    def moment(self, fqn: str, slot: str, start: int, stop: int) -> torch.Tensor:
        """A range of a moment, in fp32 where it is stored in 8 bits."""
        if self.parameters[fqn]["moments"] != "int8":
            return self.stored(fqn, f"::{slot}", start, stop)
        parts = []
        for rank, first, last in self.slices(fqn, start, stop):
            tensors = self._tensors(rank, self.parameters[fqn]["file"])
            codes = tensors.read(f"{fqn}::{slot}", first, last)
            place = self.phase(fqn, rank) + first
            scales = tensors.read(f"{fqn}::{slot}{SCALE_SUFFIX}")[place // GROUP :]
            parts.append(decode_int8(codes, scales, place % GROUP, signed=slot != "exp_avg_sq"))
        return _joined(parts)

    def scales(self, fqn: str, slot: str, rank: int) -> torch.Tensor:
        """Those of a rank's slice."""
        return self._tensors(rank, self.parameters[fqn]["file"]).read(f"{fqn}::{slot}{SCALE_SUFFIX}")

    def phase(self, fqn: str, rank: int) -> int:
        """Where in its first group an int8 moment's slice begins."""
        return json.loads(self._tensors(rank, self.parameters[fqn]["file"]).metadata[PHASES])[fqn]

    def frozen(self, fqn: str, start: int, stop: int) -> torch.Tensor:
        """A range of a parameter that was not trained, at stage 3."""
        return _joined([self.of_rank(rank).read(fqn, *place) for rank, *place in self.slices(fqn, start, stop)])

    def of_rank(self, rank: int) -> Tensors:
        """What else is a rank's own."""
        return self._tensors(rank, "")

    def dtype_of_rest(self, name: str) -> str:
        """Of a buffer, or a parameter that was not trained."""
        return self.of_rank(0).code(name)

    def factored(self, fqn: str, name: str) -> torch.Tensor:
        """A tensor that is whole in rank 0's file, flattened."""
        return self._tensors(0, self.parameters[fqn]["file"]).read(name)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts)) if parts else torch.empty(0)
