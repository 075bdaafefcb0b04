"""Measured memory: peaks by rank, block, phase and role around an engine's steps."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed import comm as dist

from hift_ds.distributed import MPI_VARIABLES, of_all_ranks
from hift_ds.extras import needs_recipes
from hift_ds.memory.figures import PHASES
from hift_ds.memory.peaks import OF_ALLOCATOR, ON_CPU, ON_CUDA, RankRecord, Report, Sample
from hift_ds.memory.storages import StorageMeter

_METHODS = dict(zip(("forward", "backward", "step"), PHASES, strict=True))  # the engine's method -> the phase


class _CudaProbe:
    """torch's caching allocator. None of it waits for the device: the allocator's books are the host's.

    Peaks are those since `restart`, by the names of a sample's fields; `allocated` is bytes of tensors now.
    """

    kind = ON_CUDA

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> dict[str, int]:
        statistics = torch.cuda.memory_stats(self._device)
        return {name: statistics[f"{name}_bytes.all.peak"] for name in ("allocated", *OF_ALLOCATOR)}

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)


class _TensorProbe:
    """The same by counting tensors, where there is no allocator to ask."""

    kind = ON_CPU

    def __init__(self, meter: StorageMeter) -> None:
        self._meter = meter

    def restart(self) -> None:
        self._meter.restart()

    def read(self) -> dict[str, int]:
        return {"allocated": self._meter.peak}

    def allocated(self) -> int:
        return self._meter.current


@dataclass
class MemoryMeter:
    """Measures each forward, backward and update that `engine` makes inside `with meter:`.

    On CUDA the peaks are the allocator's, and cost nothing. On a CPU tensors are counted by a dispatch mode, which
    slows small models down; that is not GPU memory, and the report says so. What is split by role: model weights and
    state by their tensors, gradients by what is left of them after the phase, `other` by what else was there before the
    first phase; the rest of a peak is activations, with what stage 3 has gathered for the moment and DeepSpeed's own
    buckets, and in the update the update's own tensors.

    Example:
        >>> with MemoryMeter(engine) as meter:
        ...     train(engine)
        >>> report = meter.gather()  # on every rank
        >>> report.write(Path("memory.json"))
    """

    engine: Any
    _samples: dict[tuple[int, str], Sample] = field(default_factory=dict, init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)
    _other: int | None = field(default=None, init=False)
    _block: int = field(default=-1, init=False)

    def __enter__(self) -> MemoryMeter:
        device = self.engine.device
        if device.type == "cuda":
            self._probe: _CudaProbe | _TensorProbe = _CudaProbe(device)
        else:
            mode = StorageMeter()
            for tensor in [*_weights(self.engine), *_state(self.engine), *_gradients(self.engine)]:
                mode.add(tensor)
            self._stack.enter_context(mode)
            self._probe = _TensorProbe(mode)
        for method, phase in _METHODS.items():
            self._wrap(method, phase)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def gather(self) -> Report:
        """All ranks' peaks in one report. Collective: through mpi4py under mpirun, else deepspeed.comm."""
        engine = self.engine
        record = RankRecord(
            rank=dist.get_rank(),
            node=socket.gethostname(),
            device=torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
            kind=self._probe.kind,
            samples=tuple(self._samples.values()),
        )
        hift = getattr(engine, "hift", None)
        names = [block.name for block in hift.blocks] if hift is not None else []
        return Report(tuple(_all_ranks(record)), tuple(names))

    def _wrap(self, method: str, phase: str) -> None:
        original = getattr(self.engine, method)

        def measured(*args: Any, **kwargs: Any) -> Any:
            self._begin(phase)
            result = original(*args, **kwargs)
            self._end(phase)
            return result

        setattr(self.engine, method, measured)  # on the instance; the class keeps its own
        self._stack.callback(delattr, self.engine, method)

    def _begin(self, phase: str) -> None:
        engine = self.engine
        if phase == "forward":
            hift = getattr(engine, "hift", None)
            self._block = -1 if hift is None else hift.active_block
        if self._other is None:
            known = _bytes(_weights(engine), engine.device) + _bytes(_state(engine), engine.device)
            self._other = max(0, self._probe.allocated() - known - _bytes(_gradients(engine), engine.device))
        self._before = _bytes(_gradients(engine), engine.device)
        self._probe.restart()

    def _end(self, phase: str) -> None:
        engine = self.engine
        if not getattr(engine.module, "training", True):
            return  # an evaluation is not a step
        assert self._other is not None  # since the first `_begin`
        peaks = self._probe.read()
        weights, state = _bytes(_weights(engine), engine.device), _bytes(_state(engine), engine.device)
        gradients = max(self._before, _bytes(_gradients(engine), engine.device))
        rest = peaks["allocated"] - weights - state - self._other
        gradients = max(0, min(gradients, rest))
        sample = Sample(
            block=self._block, phase=phase, weights=weights, state=state, gradients=gradients,
            activations=max(0, rest - gradients), other=self._other, **peaks,
        )  # fmt: skip
        key = (self._block, phase)
        self._samples[key] = self._samples.get(key, sample).joined(sample)
        if phase == "update" and engine.monitor.enabled:
            peak = max(s.allocated for s in self._samples.values() if s.block == self._block)
            events = [("Memory/peak_allocated_bytes", peak, engine.global_samples)]
            events += [
                (f"Memory/{role}_bytes", getattr(sample, role), engine.global_samples)
                for role in ("weights", "state", "gradients")
            ]
            engine.monitor.write_events(events)


def _weights(engine: Any) -> Iterator[torch.Tensor]:
    for param in engine.module.parameters():
        yield param
        if hasattr(param, "ds_tensor"):
            yield param.ds_tensor
    yield from engine.module.buffers()


def _state(engine: Any) -> Iterator[torch.Tensor]:
    """Masters and moments, of HiFT or of DeepSpeed's own optimizer."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "active_states"):
        for state in [*optimizer.states, *([] if optimizer.always is None else [optimizer.always])]:
            yield from state.all_tensors()
        if optimizer.ring is not None:
            yield optimizer.ring.buffer
        return
    basic = getattr(optimizer, "optimizer", optimizer)
    weights = {id(param) for param in engine.module.parameters()}  # at stage 0 in fp32 they are their own masters
    for group in getattr(basic, "param_groups", []):
        yield from (param for param in group["params"] if id(param) not in weights)
    for tensors in getattr(basic, "state", {}).values():
        yield from (value for value in tensors.values() if isinstance(value, torch.Tensor))


def _gradients(engine: Any) -> Iterator[torch.Tensor]:
    reducer = getattr(engine.optimizer, "reducer", None)
    for param in engine.module.parameters():
        if param.grad is not None:
            yield param.grad
    if reducer is not None:
        yield from reducer.tensors()


def _bytes(tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    """Of the distinct storages on a device."""
    storages = {}
    for tensor in tensors:
        if tensor.device.type == device.type:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


@needs_recipes()
def _all_ranks(record: RankRecord) -> list[RankRecord]:
    if any(name in os.environ for name in MPI_VARIABLES):
        from mpi4py import MPI

        if MPI.COMM_WORLD.size == dist.get_world_size():  # else it started one rank a node or the like
            return MPI.COMM_WORLD.allgather(record)
    return of_all_ranks(record)
