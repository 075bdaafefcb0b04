"""Cases that run on ranks: errors that reach every rank."""

from __future__ import annotations

import argparse

from deepspeed import comm as dist

from hift_ds.distributed import agree
from hift_ds.recipes.setup import load_run


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


def loads(args: argparse.Namespace, datasets: list[str]) -> str:
    """How loading a run ends where each rank is given a data set of its own. Collective."""
    args.dataset = datasets[dist.get_rank()]
    try:
        return f"{len(load_run(args).data.train)} rows"
    except (RuntimeError, FileNotFoundError) as error:
        return str(error)
