"""What compiled parts of layers move: all that waits for the same products is one kernel.

What a kernel made for itself, and a later one of the same part wants (backward: what forward had), that one makes anew
from what it came of, as torch's partitioner has it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Record:
    """An operation.

    Attributes:
        part: Of a layer, that it belongs to; `None`: of none.
        visit: Which of the times that a part was entered.
        operations: Of a product of matrices, or attention, which is a kernel of its own; else `None`.
        moved: Bytes, where it is a kernel of its own.
        reads, writes: Bytes of each storage.
    """

    part: str | None
    visit: int
    operations: int | None
    moved: int
    reads: Mapping[int, int]
    writes: Mapping[int, int]


@dataclass
class _Kernel:
    part: str
    first: int  # of its operations
    reads: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)


def moved_when_fused(records: Sequence[Record], grads: Collection[int]) -> list[int]:
    """Bytes that each operation moves, outside of parts alone; those of a kernel stand at its first one.

    Args:
        grads: Storages of parameters' gradients.
    """
    kernels: dict[tuple[int, int], _Kernel] = {}
    made: dict[int, tuple[_Kernel, Collection[int]]] = {}  # a storage: by which kernel, of what
    sizes: dict[int, int] = {}
    needed, depths, visit = set(grads), dict[int, int](), None
    moved = [record.moved for record in records]
    for index, record in enumerate(records):
        if record.visit != visit:
            visit, depths = record.visit, {}
        depth = max((depths.get(storage, 0) for storage in record.reads), default=0)
        depths.update(dict.fromkeys(record.writes, depth + (record.operations is not None)))
        if record.part is None or record.operations is not None:
            needed.update(record.reads)
            continue
        kernel = kernels.setdefault((record.visit, depth), _Kernel(record.part, index))
        moved[index] = 0
        for storage, size in (*record.reads.items(), *record.writes.items()):
            sizes[storage] = max(size, sizes.get(storage, 0))
        kernel.reads.update(record.reads.keys() - kernel.writes)
        kernel.writes.update(record.writes)
        needed.update(storage for storage in record.reads if storage in made and made[storage][0].part != record.part)
        for storage in record.writes:
            made.setdefault(storage, (kernel, tuple(record.reads)))
    for kernel in kernels.values():
        writes = sum(sizes[key] for key in kernel.writes if key in needed or made[key][0] is not kernel)
        reads = sum(sizes[key] for key in _in_memory(kernel.reads, made, needed))
        if writes:  # else those who read it make it
            # A gradient is a sum over tokens, for which torch.compile has a kernel of its own.
            moved[kernel.first] = reads * (1 if kernel.writes.isdisjoint(grads) else 2) + writes
    return moved


def _in_memory(
    reads: Collection[int], made: Mapping[int, tuple[_Kernel, Collection[int]]], needed: Collection[int]
) -> set[int]:
    """What is read for `reads`: instead of what no kernel has written, what that came of."""
    found, todo = set[int](), list(reads)
    while todo:
        storage = todo.pop()
        if storage in found:
            continue
        if storage in needed or storage not in made:
            found.add(storage)
        else:
            todo += made[storage][1]
    return found
