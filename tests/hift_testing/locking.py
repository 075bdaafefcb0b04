"""A stand-in for CUDA's page-locking."""

from __future__ import annotations


class Driver:
    """What `HostMemory` calls; `fails`: refuses.

    Attributes:
        locked: Bytes by address.
        attempts: Calls of `register`.
    """

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.locked, self.attempts = fails, {}, 0

    def register(self, address: int, nbytes: int) -> None:
        self.attempts += 1
        if self.fails:
            raise RuntimeError("out of memory")
        self.locked[address] = nbytes

    def unregister(self, address: int) -> None:
        del self.locked[address]
