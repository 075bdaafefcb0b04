"""The optimizer's `state_dict` and `load_state_dict` by themselves, without files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hift_ds.checkpoint.content import RunState, facts, phases, tensors_of
from hift_ds.checkpoint.fit import require_state_fits
from hift_ds.checkpoint.restore import load_position, load_states, load_weights
from hift_ds.checkpoint.saved import Held, Saved


def state_of(run: RunState) -> dict[str, Any]:
    """This rank's part of the optimizer: facts of the run, and tensors by part and name, which are no copies."""
    tensors = {
        part: ({name: tensor for state in states for name, tensor in tensors_of(state).items()}, phases(states))
        for part, states in run.parts.items()
    }
    described = json.loads(json.dumps({**facts(run), "frozen": {}}))
    return {
        "hift": {"facts": described, "rank": run.rank, "tensors": tensors},
        "zero_stage": run.stage, "partition_count": run.state_ranks,  # as DeepSpeed's
    }  # fmt: skip


def restore(
    run: RunState, module: torch.nn.Module, given: Mapping[str, Any] | Sequence[Mapping[str, Any]], states: bool
) -> None:
    """Restores what `state_of` has given on every rank, as a list by rank, or on a lone one.

    Args:
        run: Takes it.
        module: Its model, whose weights are taken too at stage 3, where nothing else has them.
        given: All of it that is there.
        states: Masters, moments and position are wanted, too.

    Raises:
        RuntimeError: It is of another rule or other param groups, or a rank's part is missing.
    """
    parts = [given] if isinstance(given, Mapping) else given
    by_rank = {part["hift"]["rank"]: part["hift"] for part in parts}

    def tensors(rank: int, part: str) -> Held:
        if rank not in by_rank:
            raise RuntimeError(f"the optimizer's state of rank {rank} is not given: give load_state_dict all ranks'")
        return Held(*by_rank[rank]["tensors"][part])

    saved = Saved(parts[0]["hift"]["facts"], tensors)
    require_state_fits(run, saved)
    if run.stage == 3:
        load_weights(module, run, saved, run.rank, run.world)
    if states:
        load_states(run, saved)
        load_position(run, saved)
