"""What a forward and a backward have to do: operations of products, and bytes that all else moves in memory.

Counted over the real architecture under FakeTensorMode, operation by operation.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hift_ds.memory.fake_model import FakeModel, one_sequence_a_row

_ATEN = torch.ops.aten
# Fused attention, as a CPU names it: the first of its queries, keys and values among the arguments.
_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: 0,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: 1,
}
_UNLISTED = {_ATEN.addmm_: _ATEN.addmm}  # products that torch's counter leaves out, and what counts them
_MOVES_NOTHING = ("empty", "new_empty", "detach", "_unsafe_view")


@dataclass(frozen=True)
class Work:
    """Operations of products; bytes that other operations read and write."""

    operations: int = 0
    moved: int = 0


def micro_step_work(
    model: FakeModel, trained: Collection[str], micro_batch: int, seq: int, padded: bool = False
) -> tuple[Work, dict[str, Work]]:
    """Of a forward and a backward in which the parameters `trained` (fqns) have gradients, and no others.

    Returns:
        Of the forward; and of the backward, recomputation included, up to where each one's gradient is whole.
    """
    forward, backward = _Counter(), _Counter()
    until: dict[str, Work] = {}
    model.train_only(trained)

    def whole(fqn: str, param: torch.nn.Parameter) -> None:
        param.grad = None
        until[fqn] = backward.work

    handles = [
        param.register_post_accumulate_grad_hook(functools.partial(whole, fqn))
        for fqn, param in model.module.named_parameters() if param.requires_grad
    ]  # fmt: skip
    try:
        with model.mode, one_sequence_a_row():
            batch = model.batch(micro_batch, seq, padded)
            with forward:
                loss = model.module(**batch).loss
            with backward:
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return forward.work, until


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._operations = self._moved = 0

    @property
    def work(self) -> Work:
        return Work(self._operations, self._moved)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = _UNLISTED.get(func.overloadpacket, func.overloadpacket)
        if packet in _ATTENTION:
            self._operations += _of_attention(args[_ATTENTION[packet] :], backward=bool(_ATTENTION[packet]))
        elif packet in flop_registry:
            self._operations += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif func.namespace == "aten" and not func.is_view and not packet.__name__.startswith(_MOVES_NOTHING):
            for side in ((args, kwargs), out):
                held = [tensor for tensor in tree_leaves(side) if isinstance(tensor, torch.Tensor)]
                self._moved += sum({id(tensor): tensor.nbytes for tensor in held}.values())
        return out


def _of_attention(tensors: Sequence[torch.Tensor], backward: bool) -> int:
    """Of queries (batch, heads, tokens, width), keys and values, whose heads several queries' may share.

    Of the whole square, though half is masked: attention reaches about half of other products' rate. Backward makes the
    scores anew. torch's own count wants as many heads of keys in some versions.
    """
    query, key, value = tensors[:3]
    square = 2 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    width, width_of_values = query.shape[3], value.shape[3]
    return square * (3 * width + 2 * width_of_values if backward else width + width_of_values)
