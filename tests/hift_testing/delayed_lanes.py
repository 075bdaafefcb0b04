"""Queues of device work that run as late, or in as bad an order, as their events permit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hift_ds.state.ring import Lanes


@dataclass(frozen=True)
class Event:
    """The first `position` items of `lane` are done."""

    lane: QueuedLane
    position: int

    def is_past(self) -> bool:
        return self.lane.done >= self.position

    def force(self) -> None:
        while not self.is_past():
            self.lane.advance(force=True)


class QueuedLane:
    """Work waits in the queue until somebody forces an event of this lane, or `drain` runs it.

    Args:
        deaf_to: Lanes (by name) whose events are not waited for: an error that a test plants.
    """

    def __init__(self, name: str, deaf_to: Sequence[str] = ()) -> None:
        self.name, self.deaf_to = name, tuple(deaf_to)
        self.items: list[Callable[[], None] | Event] = []
        self.done = 0
        self.used: list[torch.Tensor] = []
        self.copied_bytes = 0

    def run(self, work: Callable[[], None]) -> None:
        self.items.append(work)

    def record(self) -> Event:
        return Event(self, len(self.items))

    def wait(self, event: Event) -> None:
        if event.lane.name not in self.deaf_to:
            self.items.append(event)

    def synchronize(self) -> None:
        self.record().force()

    def uses(self, tensor: torch.Tensor) -> None:
        self.used.append(tensor)

    def copied(self, nbytes: int) -> None:
        self.copied_bytes += nbytes

    def can_advance(self) -> bool:
        if self.done == len(self.items):
            return False
        item = self.items[self.done]
        return not isinstance(item, Event) or item.is_past()

    def advance(self, force: bool = False) -> None:
        """Runs one item; with `force` what it waits for first."""
        item = self.items[self.done]
        if not isinstance(item, Event):
            item()
        elif force:
            item.force()
        self.done += 1


class HostLane(QueuedLane):
    """Runs work at once: where it waits for an event, that is forced."""

    def run(self, work: Callable[[], None]) -> None:
        super().run(work)
        self.synchronize()

    def wait(self, event: Event) -> None:
        super().wait(event)
        self.synchronize()


def queued(deaf: dict[str, Sequence[str]] | None = None) -> Lanes:
    """Three queues; `deaf`: lane -> lanes whose events it ignores."""
    deaf = deaf or {}
    return Lanes(*(QueuedLane(name, deaf.get(name, ())) for name in ("copy_in", "update", "copy_out")))


def lazy_copies(*_: Any) -> Lanes:
    """Copies happen at the last moment that their events permit, updates at once; in the place of `Lanes.of`."""
    return Lanes(QueuedLane("copy_in"), HostLane("update"), QueuedLane("copy_out"))


def drain(lanes: Lanes, order: Sequence[str]) -> None:
    """Runs everything: always the first lane of `order` that can go on."""
    while True:
        ready = [lane for name in order if (lane := getattr(lanes, name)).can_advance()]
        if not ready:
            break
        ready[0].advance()
    for name in order:
        lane = getattr(lanes, name)
        assert lane.done == len(lane.items), f"{name} waits for an event that never comes"
