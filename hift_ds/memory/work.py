"""What a forward and a backward have to do: operations of products, and bytes that are moved in memory.

Counted over the real architecture under FakeTensorMode, operation by operation.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hift_ds.compiled_layers import parts_of_layers
from hift_ds.memory.fake_model import FakeModel, one_sequence_a_row
from hift_ds.memory.fusion import Record, moved_when_fused

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
    """What takes time: each operation counts once, as one of these.

    Attributes:
        operations: Of products that arithmetic bounds.
        streamed: Bytes of products that memory bounds, which read and write them one after the other.
        moved: Bytes that all else reads and writes.
    """

    operations: int = 0
    moved: int = 0
    streamed: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.moved + other.moved, self.streamed + other.streamed)

    def __sub__(self, other: Work) -> Work:
        return Work(self.operations - other.operations, self.moved - other.moved, self.streamed - other.streamed)


def micro_step_work(
    model: FakeModel, trained: Collection[str], micro_batch: int, seq: int, padded: bool = False,
    compiled: bool = False, balance: float = 0.0,
) -> tuple[Work, dict[str, Work]]:  # fmt: skip
    """Of a forward and a backward in which the parameters `trained` (fqns) have gradients, and no others.

    Args:
        compiled: What is no product in a part of a layer is one kernel (`hift_ds.compile_layers`).
        balance: A product of fewer operations for each byte of its matrices is bound by memory.

    Returns:
        Of the forward; and of the backward, recomputation included, up to where each one's gradient is whole.
    """
    recorder = _Recorder()
    until: dict[str, int] = {}
    model.train_only(trained)

    def whole(fqn: str, param: torch.nn.Parameter) -> None:
        recorder.is_gradient(param.grad)
        param.grad = None
        until[fqn] = len(recorder.records)

    handles = [
        param.register_post_accumulate_grad_hook(functools.partial(whole, fqn))
        for fqn, param in model.module.named_parameters() if param.requires_grad
    ]  # fmt: skip
    try:
        with model.mode, one_sequence_a_row(), recorder.in_parts(model.module, compiled):
            batch = model.batch(micro_batch, seq, padded)
            with recorder:
                loss = model.module(**batch).loss
                middle = len(recorder.records)
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    done = recorder.work(balance)
    return done[middle], {fqn: done[count] - done[middle] for fqn, count in until.items()}


class _Recorder(TorchDispatchMode):
    """Every operation, and the part of a layer that it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []
        self._part: str | None = None
        self._visits = 0
        self._grads: set[int] = set()  # storages of parameters' gradients
        self._alive: dict[int, Any] = {}  # else another storage could have its place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = _UNLISTED.get(func.overloadpacket, func.overloadpacket)
        operations = None
        if packet in _ATTENTION:
            operations = _of_attention(args[_ATTENTION[packet] :], backward=bool(_ATTENTION[packet]))
        elif packet in flop_registry:
            operations = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif func.namespace != "aten" or func.is_view or packet.__name__.startswith(_MOVES_NOTHING):
            return out
        read, written = (
            {id(tensor): tensor for tensor in tree_leaves(side) if isinstance(tensor, torch.Tensor)}.values()
            for side in ((args, kwargs), out)
        )
        moved = sum(one.nbytes for one in (*read, *written))
        storages = self._storages(read), self._storages(written)
        self.records.append(Record(self._part, self._visits, operations, moved, *storages))
        return out

    def _storages(self, tensors: Collection[torch.Tensor]) -> dict[int, int]:
        """Bytes of each storage that some tensors are views of, at most its own."""
        found: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = storage
            found[storage._cdata] = min(storage.nbytes(), found.get(storage._cdata, 0) + tensor.nbytes)
        return found

    def is_gradient(self, tensor: torch.Tensor | None) -> None:
        """Of a parameter."""
        if tensor is not None:
            self._grads.add(tensor.untyped_storage()._cdata)

    @contextmanager
    def in_parts(self, module: torch.nn.Module, compiled: bool) -> Iterator[None]:
        """Inside, operations of layers' parts are known as theirs, if they are `compiled`.

        In backward a part without gradients for its inputs, below which there are none, does not end.
        """
        handles: list[Any] = []
        around: list[str | None] = []

        def enter(part: str | None, *_: Any) -> None:
            self._part = part
            self._visits += 1

        def begin(part: str, *_: Any) -> None:
            around.append(self._part)
            enter(part)

        def end(_: Any, grad_inputs: tuple, __: Any) -> None:
            if any(grad is not None for grad in grad_inputs):
                enter(None)

        for index, (part, _) in enumerate(parts_of_layers(module) if compiled else ()):
            handles += [
                part.register_forward_pre_hook(functools.partial(begin, str(index))),
                # Recomputation ends by an exception.
                part.register_forward_hook(lambda *_: enter(around.pop()), always_call=True),
                part.register_full_backward_pre_hook(functools.partial(enter, str(index))),
                part.register_full_backward_hook(end),
            ]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook is firing")  # where no input has a gradient
                yield
        finally:
            for handle in handles:
                handle.remove()

    def work(self, balance: float = 0.0) -> list[Work]:
        """Up to each operation, and up to the end."""
        moved = moved_when_fused(self.records, self._grads)
        each = (_work(record.operations, nbytes, balance) for record, nbytes in zip(self.records, moved, strict=True))
        return list(accumulate(each, initial=Work()))


def _work(operations: int | None, nbytes: int, balance: float) -> Work:
    if operations is None:
        return Work(moved=nbytes)
    return Work(operations) if operations >= balance * nbytes else Work(streamed=nbytes)


def _of_attention(tensors: Sequence[torch.Tensor], backward: bool) -> int:
    """Of queries (batch, heads, tokens, width), keys and values, whose heads several queries' may share.

    Of the whole square, though half is masked: attention reaches about half of other products' rate. Backward makes the
    scores anew. torch's own count wants as many heads of keys in some versions.
    """
    query, key, value = tensors[:3]
    square = 2 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    width, width_of_values = query.shape[3], value.shape[3]
    return square * (3 * width + 2 * width_of_values if backward else width + width_of_values)
