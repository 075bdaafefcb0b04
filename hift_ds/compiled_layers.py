"""Layers compiled part by part, once for all layers and blocks.

torch.compile of a whole model compiles each block's turn anew, because other parameters require gradients. The layers
of a model are alike, and of a part of one (attention, feed-forward, norm) dynamo's guards know at most four forms:
whether its weights and whether its input require gradients. So a model of any depth takes some ten compilations. Parts,
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

_UNSAFE_GUARDS = ("skip_tensor_guards_with_matching_dict_tags", "use_recursive_dict_tags_for_guards")
_FORMS = 64  # compilations that a part may have: forms, and shapes of batches


logger = logging.getLogger(__name__)


class _Part:
    """In the place of a module's `_call_impl`: compiled in training, as ever in evaluation and generation."""

    def __init__(self, module: nn.Module, backend: Any, dynamic: bool | None) -> None:
        from transformers import Cache

        self._module, self._cache = module, Cache
        self._compiled = torch.compile(module._call_impl, backend=backend, dynamic=dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self._module.training and not self._caches(kwargs):
            return self._compiled(*args, **kwargs)
        return self._module._call_impl(*args, **kwargs)

    def _caches(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward keeps keys and values, for which dynamo would compile each layer of its own."""
        found = any(isinstance(value, self._cache) for value in kwargs.values())
        if found:
            _warn_of_cache(type(self._module).__name__)
        return found


@functools.cache
def _warn_of_cache(part: str) -> None:
    logger.warning(
        "compile_layers: %s keeps keys and values in training, and runs uncompiled; set use_cache = False in the "
        "model's config, or give it to the forward", part,
    )  # fmt: skip


def compile_layers(model: nn.Module, backend: Any = "inductor", dynamic: bool | None = None) -> None:
    """Compiles the parts of a model's layers with torch.compile, for training: one kernel where there were ten.

    Results are the same but for rounding (and dropout's draws). The first steps compile; evaluation and generation run
    uncompiled. Call it before `hift_ds.initialize`; a later call takes its place. Names in `state_dict` stay, and a
    copy of the model is not compiled. ZeRO-3 gathers weights in hooks at which dynamo stops, so that `initialize`
    refuses a compiled model with it.

    Args:
        model: Of transformers.
        backend, dynamic: As torch.compile's.

    Raises:
        ValueError: No layer of the model is known to transformers as one (`GradientCheckpointingLayer`).
    """
    parts = list(parts_of_layers(model))
    if not parts:
        raise ValueError(
            f"compile_layers({type(model).__name__}): transformers names none of its modules a layer; compile what "
            "repeats yourself, with module.compile()"
        )
    for part in parts:
        part._compiled_call_impl = _Part(part, backend, dynamic)  # type: ignore[assignment]
    let_dynamo_compile(_FORMS)


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_layers` has been called on it, or on a part of it."""
    return any(isinstance(vars(part).get("_compiled_call_impl"), _Part) for part in model.modules())


def require_stage_without_hooks(stage: int) -> None:
    """Raises ValueError for ZeRO-3."""
    if stage == 3:
        raise ValueError(
            "compile_layers (--compile): ZeRO-3 gathers weights in hooks at which torch.compile stops at each of them; "
            "leave it out, or use zero_optimization.stage 0 to 2"
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
    let_dynamo_see_flags()


def let_dynamo_see_flags() -> None:
    """Where torch.compile is in use, its guards look at every parameter's `requires_grad`, which the rotation changes.

    By default they take a parameter for what it was while the dictionary that holds it is unchanged: in torch 2.11 a
    turn then ran what was compiled for a layer without gradients, and its block got none.
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


def parts_of_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with parameters, one step below the layers or within a list there."""
    for layer in layers_of(model):
        yield from _parts(layer)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(child)
        elif any(True for _ in child.parameters()):
            yield child
