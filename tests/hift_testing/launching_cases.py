"""Cases that run on ranks: errors that reach every rank."""

from __future__ import annotations

from deepspeed import comm as dist

from hift_ds.launching import agree


def agree_on(failing: tuple[int, ...]) -> int | str:
    """This rank's number through `agree`, or what it raised where a rank is in `failing`. Collective."""

    def work() -> int:
        if dist.get_rank() in failing:
            raise ValueError(f"rank {dist.get_rank()} has a bad file")
        return dist.get_rank()

    try:
        return agree(work)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
