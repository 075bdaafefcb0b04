"""The states of the generators of random numbers, as tensors: of torch, its device, Python and numpy."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from deepspeed.accelerator import get_accelerator

from hift_ds.checkpoint.saved import Tensors

_TORCH, _DEVICE, _PYTHON, _NUMPY, _GAUSS = (
    "random::torch", "random::device", "random::python", "random::numpy", "random_gauss",
)  # fmt: skip


def present(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """This process's, and what of them is no tensor, for a file's metadata."""
    _, words, gauss = random.getstate()
    numpys: dict[str, Any] = numpy.random.get_state(legacy=False)  # type: ignore[assignment]
    tensors = {
        _TORCH: torch.get_rng_state(),
        _PYTHON: torch.tensor(words),
        _NUMPY: torch.tensor([*map(int, numpys["state"]["key"]), numpys["state"]["pos"]]),
    }
    if device.type != "cpu":
        tensors[_DEVICE] = get_accelerator().get_rng_state(device.index).cpu()
    kept = {"python": gauss, "numpy": [numpys["has_gauss"], numpys["gauss"]]}
    return tensors, {_GAUSS: json.dumps(kept)}


def restore(saved: Tensors, device: torch.device) -> None:
    """Sets them; the device's where it was of the same kind."""
    kept: Mapping[str, Any] = json.loads(saved.metadata[_GAUSS])
    torch.set_rng_state(saved.read(_TORCH).clone())
    random.setstate((3, tuple(saved.read(_PYTHON).tolist()), kept["python"]))
    *key, position = saved.read(_NUMPY).tolist()
    has_gauss, gauss = kept["numpy"]
    numpy.random.set_state(("MT19937", numpy.array(key, dtype=numpy.uint32), position, has_gauss, gauss))
    if device.type != "cpu" and _DEVICE in saved:
        get_accelerator().set_rng_state(saved.read(_DEVICE).clone(), device.index)
