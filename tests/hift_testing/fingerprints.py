"""Fingerprints of an engine's weights and state, by block: what a step has changed, and whether two runs are equal."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from hift_testing.training import whole_weights


def digest(tensors: Any) -> str:
    """A fingerprint of tensors' bytes, in order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def weights_by_block(engine: Any) -> dict[str, str]:
    """Fingerprints of each block's whole weights, of the always-active ones, and of each frozen one. Collective."""
    weights, plan = whole_weights(engine), engine.block_plan
    found = {str(block.index): digest(weights[fqn] for fqn in block.fqns) for block in plan.blocks}
    found["always"] = digest(weights[fqn] for fqn in plan.always_active)
    return {**found, **{fqn: digest([weights[fqn]]) for fqn in plan.frozen}}


def state_by_block(engine: Any) -> dict[str, str]:
    """Fingerprints of each block's master, slots and step on this rank."""
    engine.optimizer.settle()
    states = dict(enumerate(engine.optimizer.block_states))
    if engine.optimizer.always is not None:
        states["always"] = [engine.optimizer.always]
    return {
        str(name): digest(tensor for state in units for tensor in state.tensors.values())
        + "".join(f" {state.step}" for state in units)
        for name, units in states.items()
    }


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names whose fingerprint differs."""
    return [name for name in before if before[name] != after[name]]


def all_by_block(engine: Any) -> dict[str, str]:
    """`weights_by_block`, and `state_by_block` under "state NAME". Collective."""
    return {**weights_by_block(engine), **{f"state {name}": mark for name, mark in state_by_block(engine).items()}}


def weights_by_name(engine: Any) -> dict[str, str]:
    """A fingerprint of each parameter, with HiFT or without. Collective."""
    return {name: digest([tensor]) for name, tensor in whole_weights(engine).items()}


def digest_of(by_block: dict[str, str]) -> str:
    """One fingerprint of several."""
    return hashlib.sha256(repr(sorted(by_block.items())).encode()).hexdigest()
