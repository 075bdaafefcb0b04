"""From a checkpoint to a folder that transformers' `from_pretrained` loads: one process, no device, little memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hift_ds.checkpoint import manifest
from hift_ds.checkpoint.content import file_name
from hift_ds.checkpoint.folder import latest_tag, write_text
from hift_ds.checkpoint.saved import RANGE, Saved
from hift_ds.checkpoint.tensor_files import DTYPES, TensorFiles, write_tensors

SHARD_BYTES = 5 * 10**9  # of a file, as transformers writes them
DTYPE_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Weight:
    """A tensor of the folder, made range by range (`tensor_files.Writable`)."""

    saved: Saved
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def parts(self) -> Iterator[torch.Tensor]:
        """In order, 1-D."""
        numel = math.prod(self.shape)
        for start in range(0, numel, RANGE):
            yield self._range(start, min(start + RANGE, numel))

    def _range(self, start: int, stop: int) -> torch.Tensor:
        saved, name = self.saved, self.name
        if name in saved.parameters:
            stored = saved.stored(name, "", start, stop)
            # The very weights; rounded from their masters they might differ at ties.
            return stored if stored.dtype == self.dtype else saved.master(name, start, stop).to(self.dtype)
        if name in saved.manifest["frozen"]:
            return saved.frozen(name, start, stop).to(self.dtype)
        return saved.of_rank(0).read(name, start, stop)


def export(checkpoint: Path, out: Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes the weights of a checkpoint, and its model's config; the files.

    Args:
        checkpoint: Its folder, or one that has "latest".
        out: The folder to write; made where it is not there.
        dtype: bf16, fp16 or fp32; `None` = the model's own. Buffers keep theirs.

    Raises:
        ValueError: No such checkpoint.
        RuntimeError: It is not HiFT's of this format, or a file of it is damaged.
        OSError: The folder cannot be written.
    """
    place = _place_of(checkpoint)
    facts = manifest.read(place)
    if facts is None or facts["format"] != manifest.FORMAT:
        raise RuntimeError(f"checkpoint {str(place)!r} was not written by HiFT in format {manifest.FORMAT}")
    manifest.verify(place, facts, [name for name in facts["files"] if name.startswith("hift_rank_")])
    files = TensorFiles()
    saved = Saved(facts, lambda rank, part: files.open(place / file_name(rank, part)))
    wanted = None if dtype is None else DTYPE_NAMES[dtype]
    # transformers ties anew, and 5.0 leaves untied what lies there under both names.
    left_out = facts["tied"] if facts["model_config"] is not None else {}
    named = {name: tuple(shape) for name, shape in facts["module"].items() if name not in left_out}
    weights = {name: _weight(saved, name, shape, wanted) for name, shape in named.items()}
    out.mkdir(parents=True, exist_ok=True)
    return [*_write_shards(weights, out, shard_bytes), *_write_config(facts, out, wanted)]


def _place_of(checkpoint: Path) -> Path:
    if (checkpoint / manifest.MANIFEST).is_file():
        return checkpoint
    tag = latest_tag(checkpoint)
    if tag is None:
        raise ValueError(
            f"{str(checkpoint)!r} has neither {manifest.MANIFEST} nor latest: name the folder that save_checkpoint was "
            "given, or one of its tags"
        )
    return checkpoint / tag


def _weight(saved: Saved, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Weight:
    """Of a parameter's first name or another one, or a buffer."""
    first = saved.manifest["tied"].get(name, name)
    facts = saved.parameters.get(first)
    own = facts["dtype"] if facts is not None else saved.dtype_of_rest(first)
    floats = DTYPES[own].is_floating_point and first not in saved.manifest["buffers"]
    return Weight(saved, first, shape, dtype if dtype is not None and floats else DTYPES[own])


def _write_shards(weights: dict[str, Weight], out: Path, shard_bytes: int) -> Iterator[Path]:
    shards: list[dict[str, Weight]] = [{}]
    sizes = {name: math.prod(weight.shape) * weight.dtype.itemsize for name, weight in weights.items()}
    filled = 0
    for name, weight in weights.items():
        if shards[-1] and filled + sizes[name] > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = weight
        filled += sizes[name]
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(out / name, shard, {"format": "pt"})
        yield out / name
    if len(shards) > 1:
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_text(out / INDEX, json.dumps(index, indent=1))
        yield out / INDEX


def _write_config(facts: dict[str, Any], out: Path, dtype: torch.dtype | None) -> Iterator[Path]:
    config = facts["model_config"]
    if config is not None:
        if dtype is not None:
            config = {**config, "dtype": str(dtype).removeprefix("torch.")}
        write_text(out / "config.json", json.dumps(config, indent=1))
        yield out / "config.json"
