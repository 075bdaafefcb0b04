"""Para, Gra and Sta as the HiFT paper counts them: whole tensors, no padding, buckets or ring.

`fp32`: weights, gradients and state in fp32. `mixed`: fp32 weights and a 16-bit copy of all, fp32 gradients and state.
`mixed_hi`: 16-bit weights, and an fp32 copy of the active block alone.

Source: arXiv 2401.15207, the tables of memory by optimizer and precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from hift_ds.rules import Rule
from hift_ds.shards import Segment

PRECISIONS = ("fp32", "mixed", "mixed_hi")


@dataclass(frozen=True)
class PaperCount:
    """Bytes of parameters, gradients and optimizer state."""

    para: int
    gra: int
    sta: int

    @property
    def total(self) -> int:
        return self.para + self.gra + self.sta


def count(
    blocks: Sequence[Iterable[tuple[str, torch.Size]]], rule: Rule, group: dict, precision: str, hift: bool
) -> PaperCount:
    """The paper's count.

    Args:
        blocks: Name and shape of each block's parameters; the largest block counts.
        rule: The optimizer.
        group: Its hyper-parameters.
        precision: One of `PRECISIONS`.
        hift: Train a block at a time; `False`: full fine-tuning.
    """
    params = [list(block) for block in blocks]
    everything = [param for block in params for param in block]
    trained = max(params, key=_numel) if hift else everything
    weights = {
        "fp32": 4 * _numel(everything),
        "mixed": 6 * _numel(everything),
        "mixed_hi": 2 * _numel(everything) + 4 * _numel(trained),
    }[precision]
    slots = 4 * _numel(trained) * len(rule.slots(group))
    segments = [Segment(name, shape, 0, shape.numel(), 0, shape.numel()) for name, shape in trained]
    with torch.device("meta"):
        factored = sum(tensor.nbytes for tensor in rule.init_extra(segments, group).values())
    return PaperCount(weights, 4 * _numel(trained), slots + factored)


def _numel(params: Iterable[tuple[str, torch.Size]]) -> int:
    return sum(shape.numel() for _, shape in params)
