"""Activation checkpointing that works with frozen inputs."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)


def use_non_reentrant_checkpointing(module: torch.nn.Module) -> bool:
    """Switches Hugging Face modules from reentrant to non-reentrant checkpointing, with one warning.

    Reentrant checkpointing gives the parameters inside it no gradient unless an input requires one, and below the
    active block nothing does. The usual remedy (`enable_input_require_grads`) drags every backward down to the
    embedding: with the top layer active 0.238 s a step against 0.088 s. It is undone here for the same reason.

    Returns:
        Whether anything was switched.
    """
    switched = False
    parts: list[Any] = list(module.modules())  # with attributes that torch's class does not declare
    for part in parts:
        function = getattr(part, "_gradient_checkpointing_func", None)
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", True):
            keywords = {**function.keywords, "use_reentrant": False}
            part._gradient_checkpointing_func = functools.partial(function.func, *function.args, **keywords)
            switched = True
    if any(getattr(part, "gradient_checkpointing", False) for part in parts):
        for part in parts:
            if getattr(part, "_require_grads_hooks", None):
                part.disable_input_require_grads()
    if switched and _is_first_rank():
        logger.warning("activation checkpointing switched to use_reentrant=False: reentrant gives HiFT no gradients")
    return switched


def keep_activations(model: torch.nn.Module, layers: int) -> None:
    """Of a model that recomputes activations in backward, lets the last `layers` layers keep theirs: a faster step.

    These are the layers that nearly every block's backward passes. Call it after `gradient_checkpointing_enable`,
    which turns all on again.

    Raises:
        ValueError: Fewer layers recompute theirs.
    """
    found = recomputing_layers(model)
    if layers > len(found):
        raise ValueError(f"keep_activations(model, {layers}): {len(found)} layers recompute activations; name fewer")
    for layer in found[len(found) - layers :]:
        layer.gradient_checkpointing = False


def kept_activations(model: torch.nn.Module) -> int:
    """How many layers `keep_activations` has taken out of the recomputation that the others are in."""
    return len(_layers(model)) - len(found) if (found := recomputing_layers(model)) else 0


def recomputing_layers(model: torch.nn.Module) -> list[Any]:
    """Those of a transformers model that recompute their activations, in its order."""
    return [layer for layer in _layers(model) if layer.gradient_checkpointing]


def _layers(model: torch.nn.Module) -> list[Any]:
    """Layers of a transformers model that know how to recompute their activations, in its order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
