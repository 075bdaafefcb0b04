"""Examples joined to rows of many: each with positions of its own, by which attention keeps them apart.

transformers builds a block-diagonal mask, or calls attention for variable lengths, where positions begin anew and no
attention mask is given. What a model does not do so (a recurrent state that goes on, an attention that knows no such
mask) `check_apart` finds out by trying.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

IGNORED = -100  # the label that torch's cross entropy leaves out
Row = tuple[torch.Tensor, ...]  # token ids, labels and, in a packed row, positions: int32


def joined(rows: Sequence[Row]) -> Row:
    """Rows end to end; the first token of each is predicted from nothing, as it is alone."""
    labels = [labels.clone() for _, labels, *_ in rows]
    for part in labels:
        part[:1] = IGNORED
    ids = [row[0] for row in rows]
    return torch.cat(ids), torch.cat(labels), torch.cat([torch.arange(len(part), dtype=torch.int32) for part in ids])


def pack_whole(rows: Iterable[Row], seq_len: int) -> list[Row]:
    """As many rows in a row, in their order, as fit in it whole; what is longer by itself is cut."""
    packed: list[list[Row]] = []
    room = 0
    for ids, labels in rows:
        row = ids[:seq_len], labels[:seq_len]
        if len(row[0]) > room:
            packed.append([])
            room = seq_len
        packed[-1].append(row)
        room -= len(row[0])
    return [joined(members) for members in packed]


def pack_cut(rows: Sequence[Row], seq_len: int) -> list[Row]:
    """End to end and cut into rows of `seq_len` tokens, the last one shorter; what a cut has left begins at 0 again."""
    if not rows:
        return []
    stream = joined(rows)
    packed = [tuple(part[i : i + seq_len] for part in stream) for i in range(0, len(stream[0]), seq_len)]
    for _, _, positions in packed:
        first_whole = [*torch.nonzero(positions == 0).flatten().tolist(), len(positions)][0]
        positions[:first_whole] -= int(positions[0])
    return packed


@torch.no_grad()
def check_apart(engine: Any, vocab_size: int) -> None:
    """Tries whether an example in a packed row sees the one before it. Collective at stage 3.

    Raises:
        ValueError: It does.
    """
    half, module = 8, engine.module
    was_training = module.training
    module.eval()
    ids = torch.arange(4 * half, device=engine.device) * 7919 % vocab_size
    second = ids[-half:]
    positions = torch.arange(half, device=engine.device).repeat(2).unsqueeze(0)
    found = [
        engine(
            input_ids=torch.cat([first, second]).unsqueeze(0), position_ids=positions, use_cache=False
        ).logits[:, half:]
        for first in (ids[:half], ids[half : 2 * half])
    ]
    module.train(was_training)
    # The same kernels over the same shapes: what is masked adds exact zeros.
    if not torch.equal(*found):
        attention = getattr(module.config, "_attn_implementation", None)
        raise ValueError(
            f"--pack: with attn_implementation {attention!r} the examples of a packed row see each other in "
            f"{type(module).__name__}; leave --pack out (--no-pack), or name another --attn_implementation (sdpa)"
        )
