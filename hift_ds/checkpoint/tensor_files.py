"""safetensors files, written from tensors where they lie and read by ranges: nothing is copied or unpickled.

Source of the format: github.com/huggingface/safetensors, "Format": 8 bytes with the header's length, a JSON header with
dtype, shape and place of each tensor, then their bytes. The library's own writer copies all tensors first.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch

CHUNK_BYTES = 64 << 20  # of a tensor on a device that come to the host at a time
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileFacts:
    """What tells a whole file from a damaged one."""

    num_bytes: int
    sha256: str


class Writable(Protocol):
    """What a file takes for a tensor that is not there as a whole."""

    @property
    def shape(self) -> Sequence[int]:
        """Of all of it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of all of it."""

    def parts(self) -> Iterator[torch.Tensor]:
        """In order, 1-D."""


class Summed:
    """A tensor that somebody may write into meanwhile: `sum` is `sum_of` of what has gone into the file."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype, self.sum = tensor.shape, tensor.dtype, 0
        self._flat = tensor.detach().reshape(-1)

    def parts(self) -> Iterator[torch.Tensor]:
        """As Writable.parts."""
        for start in range(0, self._flat.numel(), CHUNK_BYTES // self.dtype.itemsize):
            part = self._flat[start : start + CHUNK_BYTES // self.dtype.itemsize].to("cpu", copy=True)
            self.sum += sum_of(part)
            yield part


def sum_of(tensor: torch.Tensor) -> int:
    """Of a tensor's elements, taken as whole numbers; waits for its device once."""
    words = tensor.detach().reshape(-1).view(WORDS[tensor.dtype.itemsize])
    # In small parts on a CPU, where torch would make int64 of all of them first.
    parts = words.split(1 << 20 if words.device.type == "cpu" else 1 << 26)
    return int(torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum()) if words.numel() else 0


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor | Writable], metadata: Mapping[str, str]
) -> FileFacts:
    """Writes a file, and to the disk; tensors of any device, contiguous.

    Raises:
        OSError: No room, or not writable.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, place + size],
        }  # fmt: skip
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, count = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in chain((len(text).to_bytes(8, "little"), text), _bytes_of(tensors)):
            digest.update(part)
            count += file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return FileFacts(count, digest.hexdigest())


def num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """What they take in a file, but for its header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def facts_of(path: Path) -> FileFacts:
    """Of a file of any kind, all of which is read."""
    digest, count = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while part := file.read(CHUNK_BYTES):
            digest.update(part)
            count += len(part)
    return FileFacts(count, digest.hexdigest())


class TensorFile:
    """A file that is read where it is asked for.

    Attributes:
        metadata: As it was written.

    Raises:
        ValueError: Not such a file, or cut off.
    """

    def __init__(self, path: Path) -> None:
        self._map = _mapped(path)
        length = int.from_bytes(self._map[:8], "little") if len(self._map) >= 8 else -1
        try:
            header = json.loads(self._map[8 : 8 + length]) if 0 < length <= len(self._map) - 8 else None
        except ValueError:
            header = None
        if not isinstance(header, dict):
            raise ValueError(f"{str(path)!r} is not a safetensors file")
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._start, self._entries = 8 + length, header
        if max((entry["data_offsets"][1] for entry in header.values()), default=0) != len(self._map) - self._start:
            raise ValueError(f"{str(path)!r} is cut off")

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def code(self, name: str) -> str:
        """Of a tensor's dtype (`DTYPES`)."""
        return self._entries[name]["dtype"]

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Elements of a tensor, flattened; not to be written into, as they are the file's own memory.

        Raises:
            IndexError: It has not so many.
        """
        entry = self._entries[name]
        dtype, (start, stop) = DTYPES[entry["dtype"]], entry["data_offsets"]
        numel = (stop - start) // dtype.itemsize
        last = numel if last is None else last
        if not 0 <= first <= last <= numel:
            raise IndexError(f"{name!r} has {numel} elements, and {first} to {last} are asked for")
        if last == first:
            return torch.empty(0, dtype=dtype)
        place = self._start + start + first * dtype.itemsize
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=(last - first) * dtype.itemsize, offset=place)
        if raw.data_ptr() % dtype.itemsize:  # after a tensor of single bytes
            raw = raw.clone()
        return raw.view(dtype)


class TensorFiles:
    """Files, each opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, TensorFile] = {}

    def open(self, path: Path) -> TensorFile:
        """One of them."""
        if path not in self._open:
            self._open[path] = TensorFile(path)
        return self._open[path]


def _mapped(path: Path) -> Any:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""
        # Copies of what is written, which nobody does: torch warns of memory that it may not write.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _bytes_of(tensors: Mapping[str, torch.Tensor | Writable]) -> Iterator[Any]:
    for tensor in tensors.values():
        for flat in (tensor.detach().reshape(-1),) if isinstance(tensor, torch.Tensor) else tensor.parts():
            raw = flat.view(torch.uint8) if flat.numel() else flat
            for start in range(0, raw.numel(), CHUNK_BYTES):
                part = raw[start : start + CHUNK_BYTES].cpu()
                # Not numpy: a storage that it has seen can never be resized again, as `offload_states` does.
                yield memoryview((ctypes.c_char * part.numel()).from_address(part.data_ptr()))
