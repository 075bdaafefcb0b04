"""Which parameters ZeRO-3 holds gathered at each moment of a micro step: a replay of DeepSpeed's coordinator.

Source: deepspeed/runtime/zero/partitioned_param_coordinator.py, `fetch_sub_module`, `release_sub_module` and
`__params_to_release`, from the second micro step on, when its trace is complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hift_ds.memory.trace import FETCH, RELEASE, Event


@dataclass(frozen=True)
class Gathered:
    """Of one micro step; bytes on top of the shards and of what is always gathered.

    Attributes:
        during: At each event, at most.
        after: From each event to the next.
        sent: Handed to all-gathers.
    """

    during: tuple[int, ...]
    after: tuple[int, ...]
    sent: int


@dataclass(frozen=True)
class ParameterSize:
    """Of one whole parameter: elements, bytes, and bytes with every rank's slice padded."""

    numel: int
    nbytes: int
    padded_bytes: int


def replay(events: Sequence[Event], sizes: Mapping[str, ParameterSize], always: frozenset[str], zero: Any) -> Gathered:
    """What the coordinator does over `events`.

    Args:
        sizes: Of each parameter, by fqn.
        always: Parameters that stay gathered (`stage3_param_persistence_threshold`).
        zero: DeepSpeed's reading of `zero_optimization`, with its limits in elements.
    """
    coordinator = _Coordinator([e.names for e in events if e.kind == FETCH], sizes, always, zero)
    during, after = [], []
    for event in events:
        coordinator.peak = 0
        if event.kind == FETCH:
            coordinator.fetch(event.names)
        elif event.kind == RELEASE:
            coordinator.release(event.names)
        coordinator.note()
        during.append(coordinator.peak)
        after.append(coordinator.nbytes)
    return Gathered(tuple(during), tuple(after), coordinator.sent)


@dataclass
class _Bucket:
    """Parameters gathered together: the first that is waited for copies all out of one buffer, the last frees it."""

    names: frozenset[str]
    waiting: set[str]
    copied: bool = False


class _Coordinator:
    def __init__(
        self, steps: list[tuple[str, ...]], sizes: Mapping[str, ParameterSize], always: frozenset[str], zero: Any
    ) -> None:
        self.sizes, self.always, self.zero, self.steps = sizes, always, zero, steps
        self.step = self.sent = self.peak = 0
        self.queue = deque((name, step) for step, names in enumerate(steps) for name in names)
        self.fetched_for: dict[str, int] = {}
        self.gathered: set[str] = set()
        self.buckets: list[_Bucket] = []

    @property
    def nbytes(self) -> int:
        in_flight = {name for bucket in self.buckets if not bucket.copied for name in bucket.names}
        whole = sum(self.sizes[name].nbytes for name in self.gathered if name not in in_flight)
        return whole + sum(self.sizes[name].padded_bytes for bucket in self.buckets for name in bucket.names)

    def note(self) -> None:
        self.peak = max(self.peak, self.nbytes)

    def fetch(self, names: tuple[str, ...]) -> None:
        self._gather([name for name in names if self._is_absent(name)])
        for bucket in self.buckets:
            bucket.copied = bucket.copied or not bucket.waiting.isdisjoint(names)
            bucket.waiting.difference_update(names)
        self.note()
        self.buckets = [bucket for bucket in self.buckets if bucket.waiting]
        new = {name for name in names if self.fetched_for.get(name, -1) < self.step}
        seen: set[str] = set()
        while self.queue and len(seen) < len(new):
            name, step = self.queue.popleft()
            self.fetched_for[name] = step
            seen.add(name)
        self._prefetch()
        self.step += 1

    def release(self, names: tuple[str, ...]) -> None:
        kept = {name for name in names if name in self.always or self.fetched_for.get(name, -1) > self.step}
        traversed = 0
        for step in self.steps[self.step :]:
            if traversed >= self.zero.max_reuse_distance or len(kept) == len(names):
                break
            kept.update(name for name in step if name in names)
            traversed += sum(self.sizes[name].numel for name in step)
        self.gathered.difference_update(set(names) - kept)

    def _prefetch(self) -> None:
        live = sum(self.sizes[name].numel for name in self.gathered)
        room = min(self.zero.max_live_parameters - live, self.zero.prefetch_bucket_size)
        bucket: dict[str, None] = {}
        numel = 0
        while self.queue and numel < room:
            name, step = self.queue.popleft()
            self.fetched_for[name] = max(self.fetched_for.get(name, -1), step)
            if self._is_absent(name) and name not in bucket:
                bucket[name] = None
                numel += self.sizes[name].numel
        self._gather(list(bucket))

    def _gather(self, names: list[str]) -> None:
        self.sent += sum(self.sizes[name].padded_bytes for name in names)
        self.gathered.update(names)
        if len(names) > 1:
            self.buckets.append(_Bucket(frozenset(names), set(names)))

    def _is_absent(self, name: str) -> bool:
        return name not in self.gathered and name not in self.always
