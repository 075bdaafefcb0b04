"""Memory: will it fit (`planner`), did it (`peak_meter`)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hift_ds.memory.peak_meter import MemoryMeter

__all__ = ["MemoryMeter"]


def __getattr__(name: str) -> Any:
    # The meter needs DeepSpeed; what needs only a forecast or a count should not wait for it.
    if name != "MemoryMeter":
        raise AttributeError(f"module 'hift_ds.memory' has no attribute {name!r}")
    from hift_ds.memory.peak_meter import MemoryMeter

    return MemoryMeter
