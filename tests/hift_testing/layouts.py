"""Layouts of hand-made modules, for tests of the planner's arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hift_ds.config.resolve import DTYPES, resolve
from hift_ds.memory.fake_model import _cast
from hift_ds.memory.layout import Layout


def layout_of(
    module, stage=0, world=1, micro_steps=1, hift=(), zero=(), optimizer="AdamW", precision="bf16", params=(),
    on_cpu=True,
):  # fmt: skip
    """The layout of a module class; sections as in a DeepSpeed config."""
    mode = FakeTensorMode()
    with mode:
        model = SimpleNamespace(module=_cast(module(), DTYPES[precision]), mode=mode, config=None)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "optimizer": {"type": optimizer, "params": dict(params)},
        "zero_optimization": {"stage": stage, **dict(zero)},
        "hift": {"enabled": True, **dict(hift)},
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }
    device = "cpu" if on_cpu else "cuda"
    return Layout(model, resolve(config, world=world, device_type=device, separate_host=True))


class Three(nn.Module):
    """Blocks of 5000, and of 30 + 7 elements."""

    def __init__(self):
        super().__init__()
        self.large = nn.Parameter(torch.ones(100, 50))
        self.small = nn.Parameter(torch.ones(10, 3))
        self.norm = nn.Parameter(torch.ones(7))


BLOCKS = {"blocks": [["large"], ["small", "norm"]]}
ALONE, OF_FOUR = (5008, 48), (1264, 32)  # elements of their shards


def three(*args, **keywords):
    """The layout of `Three`."""
    return layout_of(Three, *args, hift=BLOCKS, **keywords)
