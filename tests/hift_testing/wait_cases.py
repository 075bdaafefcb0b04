"""Cases that run on ranks: what a step asks of the device."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from hift_testing.training import batch_of, ds_config, engine_of

# Each of these brings a value to the host (or, on a CUDA device, a host value there) and waits for the device.
OF_TENSORS = (
    "item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__",
)  # fmt: skip
OF_TORCH = ("tensor", "as_tensor", "from_numpy", "equal", "allclose", "nonzero")


@contextmanager
def waits() -> Iterator[list[tuple[str, torch.Tensor | None, str]]]:
    """Calls that would wait for a CUDA device: name, tensor, where from. Triton's interpreter, which stands in for the
    device here, is not counted."""
    found: list[tuple[str, torch.Tensor | None, str]] = []

    def counting(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            stack = traceback.extract_stack()[:-1]
            if not any("/triton/" in frame.filename for frame in stack):
                tensor = args[0] if owner is torch.Tensor else None
                found.append((name, tensor, f"{stack[-1].filename}:{stack[-1].lineno}"))
            return original(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    with ExitStack() as stack:
        for owner, names in ((torch.Tensor, OF_TENSORS), (torch, OF_TORCH)):
            for name in names:
                stack.enter_context(counting(owner, name))
        yield found


def of_steps(stage: int, dtype: str, hift: dict[str, Any], rule: dict[str, Any] | None = None) -> dict[str, Any]:
    """Eight optimizer steps, two rotations of four blocks.

    Returns:
        `waits`: where from, of every step but for the reading of what the step before has left on the host; `read`:
        how often that was read.
    """
    config = ds_config(stage, dtype, {"layers_per_block": 2, **hift}, gradient_clipping=0.5)
    if rule:
        config["optimizer"] = rule
    engine = engine_of(config)
    found: list[str] = []
    read = 0
    for step in range(2 * len(engine.hift.blocks)):
        engine.backward(engine(**batch_of(step, 0, torch.distributed.get_rank())).loss)
        optimizer = engine.optimizer
        earlier = optimizer._step.unread[0]._host if optimizer._step.unread is not None else None
        with waits() as calls:
            optimizer.step()
        read += sum(tensor is earlier for _, tensor, _ in calls if tensor is not None)
        found += [f"{name} {place}" for name, tensor, place in calls if tensor is None or tensor is not earlier]
    return {"waits": found, "read": read}
