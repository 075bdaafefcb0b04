"""What is to be planned: a model, a DeepSpeed config, a workload and the machines."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hift_ds.chunked_loss import tile_bytes_of
from hift_ds.compiled_layers import is_compiled
from hift_ds.config.resolve import ResolvedConfig, resolve, zero_section
from hift_ds.zero.activations import kept_activations

# CUDA's context, cuBLAS's workspace and the allocator's rounding and gaps: an allowance, not a measurement.
RESERVE_BYTES = 1 << 30
_UNITS = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
          "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One run.

    Attributes:
        ds_config: A DeepSpeed config with an enabled "hift" section.
        seq: Tokens of a row.
        attn_implementation: `None` = transformers' choice.
        checkpointing: Activation checkpointing.
        padded: Rows have padding, which takes an attention mask.
        gpus: Ranks of a node.
        nodes: Nodes.
        gpu_memory: Bytes of one card, by which the ring is chosen, too; `None` = not given.
        host_memory: Bytes of one node; `None` = not given.
        device_type: Where the ranks train.
        separate_host: As of `resolve`.
        optimizer: The client's, instead of the config's.
        checkpoint_frozen: Activation checkpointing of layers in which nothing is trained, too.
        keep_layers: The last layers that keep their activations (`hift_ds.keep_activations`).
        loss_tile: Bytes of a tile of the loss in chunks (`hift_ds.use_chunked_loss`); `None`: the plain loss.
        compiled: Layers are compiled (`hift_ds.compile_layers`), for a step's seconds; memory is counted as if not.
    """

    ds_config: Mapping[str, Any]
    seq: int
    attn_implementation: str | None = None
    checkpointing: bool = False
    padded: bool = False
    gpus: int = 1
    nodes: int = 1
    gpu_memory: int | None = None
    host_memory: int | None = None
    device_type: str = "cuda"
    separate_host: bool | None = None
    optimizer: Any = None
    checkpoint_frozen: bool = True
    keep_layers: int = 0
    loss_tile: int | None = None
    compiled: bool = False

    @classmethod
    def of(cls, module: Any, ds_config: Mapping[str, Any], seq: int, **others: Any) -> Request:
        """Of a transformers model that is there, with its attention, its checkpointing and its way to a loss."""
        attention = getattr(module.config, "_attn_implementation", None)
        checkpointing = bool(getattr(module, "is_gradient_checkpointing", False))
        kept = kept_activations(module)
        return cls(
            ds_config, seq, attention, checkpointing, keep_layers=kept, loss_tile=tile_bytes_of(module),
            compiled=is_compiled(module), **others,
        )  # fmt: skip

    @property
    def world(self) -> int:
        """Ranks of all nodes."""
        return self.gpus * self.nodes

    def card_holds(self, peak: int) -> bool | None:
        """Whether a peak and `RESERVE_BYTES` are within the card; `None`: its size is not given."""
        return None if self.gpu_memory is None else peak + RESERVE_BYTES <= self.gpu_memory

    def node_holds(self, host: int) -> bool | None:
        """Whether a node holds so many bytes for each of its ranks; `None`: its size is not given."""
        return None if self.host_memory is None else host * self.gpus <= self.host_memory

    @cached_property
    def config(self) -> ResolvedConfig:
        """What the config means.

        Raises:
            ValueError, TypeError: As `hift_ds.initialize`.
        """
        resolved = resolve(
            self.ds_config, world=self.world, device_type=self.device_type, separate_host=self.separate_host,
            optimizer=self.optimizer,
        )  # fmt: skip
        assert resolved is not None
        return resolved

    def changed(self, *path: str, value: Any) -> Request:
        """The request with one key of its DeepSpeed config set; `None` removes the key."""
        config = copy.deepcopy(dict(self.ds_config)) | {"zero_optimization": zero_section(self.ds_config)}
        section = config
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section.pop(path[-1], None)
        if value is not None:
            section[path[-1]] = value
        return replace(self, ds_config=config)


def parse_bytes(text: str, option: str = "") -> int:
    """Bytes of `48GiB`, `48GB`, `512MiB` or a plain number.

    Args:
        option: That it is the value of, for the error.

    Raises:
        ValueError: Anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{option} {text!r}: must be a size such as 48GiB, 24GB or 512MiB".lstrip())
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise ValueError(f"{option} {text!r}: must be more than nothing".lstrip())
    if not match[2] and size < 1 << 20:
        units = f"{match[1]}GiB or {match[1]}MiB"
        raise ValueError(f"{option} {text!r}: {size} bytes? write the unit, as in {units}".lstrip())
    return size
