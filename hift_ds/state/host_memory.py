"""Host memory of exact size for optimizer state, page-locked where there is CUDA.

torch's pinned allocator rounds each tensor up to a power of two; a 7B model's state would take up to twice its size.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes between the starts of two tensors: what CUDA's own allocations keep
Shapes = Mapping[str, tuple[int, torch.dtype]]  # name -> number of elements, dtype


_LESS = (
    'free some or raise the limit, or take less: hift.state ("master": "split16", "moments": "bf16" or "int8"), a '
    "higher ZeRO stage, fewer ranks a node"
)


def available_bytes() -> int:
    """Host memory that this process may still take: what the machine has free, within the limits of its cgroups."""
    limited = _left_in_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min([psutil.virtual_memory().available, *limited])


def _left_in_cgroups(own: Path, root: Path) -> list[int]:
    """Of each cgroup with a limit that this process is in (SLURM's --mem, a container's), page cache not counted."""
    found = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        names, top = ("memory.max", "memory.current", "inactive_file "), root
        if controllers:  # version 1
            names, top = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "), root / "memory"
        if controllers in ("", "memory"):
            place = top / path.lstrip("/")
            for folder in (place, *place.parents):
                if folder.is_relative_to(top):
                    found.extend(_left_in(folder, *names))
    return found


def _left_in(folder: Path, limit: str, used: str, cache: str) -> list[int]:
    with suppress(OSError, ValueError):  # none there, or "max"
        lines = (folder / "memory.stat").read_text().splitlines()
        cached = next((int(line.removeprefix(cache)) for line in lines if line.startswith(cache)), 0)
        return [int((folder / limit).read_text()) - int((folder / used).read_text()) + cached]
    return []


def require_host_memory(shares: Iterable[tuple[str, int, int]]) -> None:
    """Before optimizer state is allocated.

    Args:
        shares: Of each rank: its node, the bytes that it will take there, and those that are available.

    Raises:
        MemoryError: A node has less than its ranks will take.
    """
    nodes: dict[str, list[tuple[int, int]]] = {}
    for node, *share in shares:
        nodes.setdefault(node, []).append((share[0], share[1]))
    for node, found in nodes.items():
        needed, available = sum(needed for needed, _ in found), min(available for _, available in found)
        if needed > available:
            raise MemoryError(
                f"optimizer state: {needed / 2**30:.1f} GiB of host memory are needed on {node} "
                f"({len(found)} rank{'s' * (len(found) > 1)}) and {available / 2**30:.1f} GiB are available: {_LESS}"
            )


class HostMemory:
    """Allocates arenas; one warning, and pageable memory from then on, where page-locking fails (`ulimit -l`).

    Args:
        register: Page-locks (address, bytes); raises RuntimeError where it cannot. `None`: pageable memory.
        unregister: The inverse, given the address.
    """

    def __init__(
        self, register: Callable[[int, int], None] | None = None, unregister: Callable[[int], None] | None = None
    ) -> None:
        self._register, self._unregister = register, unregister

    @classmethod
    def pinned(cls) -> HostMemory:
        """For a process that has initialised CUDA."""
        return cls(_cuda_register, _cuda_unregister)

    def arena(self, shapes: Shapes) -> dict[str, torch.Tensor]:
        """Uninitialised 1-D tensors side by side in one arena, which lives as long as any of them.

        Each tensor is a storage of its own, so that `torch.save` writes it and nothing else.
        """
        offsets, total = {}, 0
        for name, (numel, dtype) in shapes.items():
            offsets[name] = total
            total += math.ceil(numel * dtype.itemsize / ALIGNMENT) * ALIGNMENT
        memory = self._allocate(total) if total else None
        return {
            name: torch.frombuffer(memory, dtype=dtype, count=numel, offset=offsets[name])
            if numel else torch.empty(0, dtype=dtype)
            for name, (numel, dtype) in shapes.items()
        }  # fmt: skip

    def _allocate(self, nbytes: int) -> mmap.mmap:
        try:
            memory = _Memory(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:  # `ulimit -v`, vm.overcommit_memory 2
            raise MemoryError(
                f"optimizer state: the system refuses {nbytes / 2**30:.1f} GiB more of host memory ({error}), "
                f"{available_bytes() / 2**30:.1f} GiB are available: {_LESS}"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):  # before a page is touched: fewer to fault in and to lock
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        if self._register is not None and self._unregister is not None:
            try:
                memory.lock(self._register, self._unregister)
            except RuntimeError as error:
                self._register = None
                logger.warning(
                    "page-locking %.1f MiB of host memory failed (%s): optimizer state stays pageable, its transfers "
                    "are slow, and steps wait for them; raise `ulimit -l`, or say so with hift.state.pin_memory: false",
                    nbytes / 2**20, error,
                )  # fmt: skip
        return memory


class _Memory(mmap.mmap):
    """An anonymous map that is unlocked before it goes."""

    _unlock: Callable[[], None] | None = None

    def lock(self, register: Callable[[int, int], None], unregister: Callable[[int], None]) -> None:
        address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        register(address, len(self))
        # A child of fork() would make the pages copy-on-write, and a transfer in flight would miss the parent's next
        # write; it does not need them.
        self.madvise(mmap.MADV_DONTFORK)
        owner = os.getpid()
        self._unlock = lambda: unregister(address) if os.getpid() == owner else None

    def __del__(self) -> None:
        if self._unlock is not None:
            self._unlock()


def _cuda_register(address: int, nbytes: int) -> None:
    code = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
    if int(code) != 0:
        with suppress(RuntimeError):  # CUDA keeps the error for the next kernel's check: let it be one nobody needs
            torch.zeros(1, device="cuda")
        raise RuntimeError(f"cudaHostRegister: error {int(code)}")


def _cuda_unregister(address: int) -> None:
    if torch.cuda is not None and torch.cuda.is_initialized():  # at the interpreter's end there may be no torch left
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(address)
