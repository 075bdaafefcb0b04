"""DeepSpeed's own file of a checkpoint, a pickle."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hift_ds.checkpoint.manifest import DAMAGED


def opened(path: Path) -> dict[str, Any]:
    """DeepSpeed's file of a checkpoint, whose tensors stay on the disk.

    Raises:
        RuntimeError: It is missing or cannot be read.
    """
    if not path.is_file():
        raise RuntimeError(f"checkpoint file {str(path)!r} is missing: the save was cut off; load another tag")
    try:
        # Mapped where it can be; with checkpoint_serialization: false it cannot.
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=False)
    except Exception as error:  # of unpickling, any
        raise RuntimeError(f"checkpoint file {str(path)!r} cannot be read ({error}): {DAMAGED}") from error


def shapes_of_file(file: Mapping[str, Any]) -> dict[str, list[int]]:
    """Of everything in a module that plain DeepSpeed has saved."""
    shapes = {name: value.shape for name, value in file["module"].items() if isinstance(value, torch.Tensor)}
    for of_a_group in file.get("param_shapes") or []:  # at stage 3 the module's are placeholders
        shapes.update(of_a_group)
    shapes.update(file.get("frozen_param_shapes") or {})
    if file.get("param_shapes"):
        for other, name in (file.get("shared_params") or {}).items():
            shapes[other] = shapes[name]
    return {name: list(shape) for name, shape in shapes.items()}
