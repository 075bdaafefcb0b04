"""Layers compiled part by part, once for all layers and blocks.

torch.compile of a whole model compiles each block's turn anew, because other parameters require gradients. The layers
of a model are alike, and of a part of one (attention, feed-forward, norm) dynamo's guards know at most four forms:
whether its weights and whether its input require gradients. So a model of any depth takes as many compilations. Parts,
and not whole layers: a layer's own forward recomputes its activations, and stays as it is.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hift_ds.last_product import without_last_product
from hift_ds.shards import is_partitioned

# What dynamo takes for constant, and the rotation or the user changes: `requires_grad`, and hooks of modules.
_UNSAFE_GUARDS = (
    "skip_tensor_guards_with_matching_dict_tags", "use_recursive_dict_tags_for_guards", "skip_nnmodule_hook_guards",
)  # fmt: skip
_FORMS = 64  # compilations that a part may have: forms, and shapes of batches

logger = logging.getLogger(__name__)


class _Part:
    """In the place of a module's `_call_impl`: compiled in training, as ever in evaluation and generation."""

    def __init__(self, module: nn.Module, layer: Any, backend: Any, dynamic: bool | None) -> None:
        from transformers import Cache

        self._module, self._layer, self._cache = module, layer, Cache
        self._compiled = torch.compile(module._call_impl, backend=without_last_product(backend), dynamic=dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._module.training and not self._caches(kwargs):
            if torch.is_grad_enabled():
                return self._compiled(*args, **kwargs)
            if self._layer.gradient_checkpointing and recomputes_reentrantly(self._layer):
                raise ValueError(  # this pass is uncompiled, and its dropout would draw other masks than the second's
                    "compile_layers: not with reentrant checkpointing, which runs a layer without gradients first; "
                    'call gradient_checkpointing_enable({"use_reentrant": False})'
                )
        return self._module._call_impl(*args, **kwargs)

    def _caches(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward keeps keys and values, for which dynamo would compile each layer of its own."""
        found = any(isinstance(value, self._cache) for value in kwargs.values())
        if found and torch.is_grad_enabled():
            _warn_of_cache(type(self._module).__name__)
        return found


@functools.cache
def _warn_of_cache(part: str) -> None:
    logger.warning(
        "compile_layers: %s keeps keys and values in training, and runs uncompiled; call the model with "
        "use_cache=False, or set it in its config (a decoder may have one of its own)", part,
    )  # fmt: skip


def compile_layers(model: nn.Module, backend: Any = "inductor", dynamic: bool | None = None) -> None:
    """Compiles the parts of a model's layers with torch.compile, for training: one kernel where there were ten.

    Results are the same but for rounding (and dropout's draws). The first steps compile; evaluation and generation run
    uncompiled, and so does attention that keeps keys and values (`use_cache`, transformers' default but for recomputed
    activations and the Trainer; a warning says so). Call it before `hift_ds.initialize`; a second call takes the place
    of the first. Names in `state_dict` stay, and a copy of the model is not compiled. ZeRO-3 gathers weights in hooks
    at which dynamo stops: refused. So is reentrant checkpointing, at the first forward. Gradients of gradients
    (`create_graph`) are beyond torch.compile.

    Args:
        model: Of transformers.
        backend, dynamic: As torch.compile's.

    Raises:
        TypeError: No module.
        ValueError: No layer of the model is known to transformers as one (`GradientCheckpointingLayer`); it has a
            recurrent state; its parameters are partitioned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compile_layers({type(model).__name__}): must be a torch.nn.Module")
    if any(is_partitioned(param) for param in model.parameters()):
        require_stage_without_hooks(3)
    for part, layer in parts_of_layers(model):
        part._compiled_call_impl = _Part(part, layer, backend, dynamic)  # type: ignore[assignment]
    let_dynamo_compile(_FORMS)


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_layers` has been called on it, or on a part of it."""
    return any(isinstance(vars(part).get("_compiled_call_impl"), _Part) for part in model.modules())


def require_stage_without_hooks(stage: int) -> None:
    """Raises ValueError for ZeRO-3."""
    if stage == 3:
        raise ValueError(
            "compile_layers (--compile): ZeRO-3 gathers weights in hooks, and torch.compile stops at each; leave it "
            "out, or use zero_optimization.stage 0 to 2"
        )


def require_compiler(device: torch.device) -> None:
    """Raises ValueError where torch.compile does not work. A few seconds."""
    try:
        torch.compile(torch.nn.functional.silu)(torch.ones(2, device=device))
    except Exception as error:  # whatever the compiler, its subprocess or the driver raises
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--compile: torch.compile does not work here ({first}); install a C++ compiler (g++), or leave it out"
        ) from error


def let_dynamo_compile(times: int) -> None:
    """Before dynamo, in silence, runs a function's further forms uncompiled; its own limit is 8."""
    import torch._dynamo

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, times)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * times)
    let_dynamo_see_changes()


def let_dynamo_see_changes() -> None:
    """Where torch.compile is in use, its guards look at every parameter's `requires_grad` and at modules' hooks.

    By default they take a parameter for what it was while the dictionary that holds it is unchanged: in torch 2.11 a
    turn then ran what was compiled for a layer without gradients, and its block got none. And a layer with a hook
    inside ran what was compiled for one without.
    """
    dynamo = sys.modules.get("torch._dynamo")
    unsafe = [name for name in _UNSAFE_GUARDS if getattr(getattr(dynamo, "config", None), name, False)]
    for name in unsafe:
        setattr(dynamo.config, name, False)  # type: ignore[union-attr]
    if unsafe:
        torch._dynamo.reset()


def layers_of(model: nn.Module) -> list[Any]:
    """Layers of a transformers model that know how to recompute their activations, in its order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]


def recomputes_reentrantly(layer: Any) -> bool:
    """Whether a module of transformers recomputes its activations by torch's reentrant checkpointing."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return isinstance(function, functools.partial) and function.keywords.get("use_reentrant", True)


def parts_of_layers(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Modules with parameters, one step below the layers or within a list there, each with its layer.

    Raises:
        ValueError: There are none, or the model has a recurrent state, whose loops over tokens dynamo unrolls.
    """
    why = None
    layers = layers_of(model)
    if any(getattr(part, "_is_stateful", False) for part in model.modules()):
        why = "keeps a recurrent state, whose loops over tokens torch.compile would unroll"
    elif not layers:
        why = "has no module that transformers names a layer"
    if why is not None:
        raise ValueError(
            f"compile_layers (--compile): {type(model).__name__} {why}; leave it out, or compile parts of it yourself "
            "(module.compile())"
        )
    for layer in layers:
        for part in _parts(layer):
            yield part, layer


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(child)
        elif any(True for _ in child.parameters()):
            yield child
