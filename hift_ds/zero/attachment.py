"""What HiFT puts on a user's module, and how it comes off again: gradient hooks, `zero_grad` and `requires_grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch

from hift_ds.shards import is_partitioned
from hift_ds.zero.traces import leave_inference_mode

Flags = dict[torch.nn.Parameter, bool]
# where torch keeps the hooks of a module
_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip


class Attachment:
    """On `params` from `attach` to `detach`.

    Args:
        module: The user's.
        params: Every trained parameter.
        on_gradient: Called when `.grad` of one of them has been accumulated.
        on_zero_grad: A method; called after the module's own `zero_grad`.
        as_found: `requires_grad` of all of the module's parameters before `initialize`.
    """

    def __init__(
        self, module: torch.nn.Module, params: Iterable[torch.nn.Parameter],
        on_gradient: Callable[[torch.nn.Parameter], None], on_zero_grad: Callable[[], None], as_found: Flags,
    ) -> None:  # fmt: skip
        self._module, self._params, self._as_found = module, list(params), as_found
        self._on_gradient, self._on_zero_grad = on_gradient, WeakMethod(on_zero_grad)
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Collective at stage 3."""
        for param in self._params:
            # A partitioned parameter has shape 0, and so would the gradient that autograd expects for it.
            if is_partitioned(param):
                param.all_gather()
            param.requires_grad_(True)
            self._handles.append(param.register_post_accumulate_grad_hook(self._on_gradient))
            if is_partitioned(param):
                param.partition()
            else:
                # A copy trains on its own: it has the user's flag, not that of the present turn.
                vars(param)["__deepcopy__"] = partial(_copied, param, self._as_found[param])
        _ON_ZERO_GRAD[self._module] = self._on_zero_grad
        if "zero_grad" not in vars(self._module):  # a deepcopy gets a method of its own, that drops nothing here
            self._module.zero_grad = MethodType(zero_grad, self._module)  # type: ignore[method-assign]

    def detach(self) -> None:
        """The parameters are as the user had them. May be called again."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for param in self._params:
            vars(param).pop("__deepcopy__", None)
        self.restore_flags()
        _take_off(self._module)

    def restore_flags(self) -> None:
        """`requires_grad` is as the user had it."""
        leave_inference_mode(self._as_found)
        for param, flag in self._as_found.items():
            param.requires_grad_(flag)

    def freeze_untrained(self) -> None:
        """What was left out or frozen does not require gradients."""
        for param in self._as_found.keys() - set(self._params):
            param.requires_grad_(False)


_ON_ZERO_GRAD: WeakKeyDictionary[torch.nn.Module, WeakMethod[Any]] = WeakKeyDictionary()


def zero_grad(module: torch.nn.Module, set_to_none: bool = True) -> None:
    """The module's own, which finds no gradient on a parameter whose gradient has been reduced; then these go, too."""
    type(module).zero_grad(module, set_to_none)
    reference = _ON_ZERO_GRAD.get(module)
    also = None if reference is None else reference()
    if also is not None:
        also()


def _take_off(module: torch.nn.Module) -> None:
    if getattr(vars(module).get("zero_grad"), "__func__", None) is zero_grad:
        del module.zero_grad


@contextmanager
def unchanged_on_failure(module: torch.nn.Module | None, flags: Flags | None = None) -> Iterator[Flags]:
    """Takes off again what a failed `initialize` has put on a module: hooks and flags; yields the flags as found.

    Args:
        flags: As found; `None` = the present ones.
    """
    if not isinstance(module, torch.nn.Module):  # which is refused inside
        yield flags or {}
        return
    if flags is None:
        flags = {param: param.requires_grad for param in module.parameters()}
    untouched = "zero_grad" not in vars(module)  # else a living engine's
    hooks = {part: {name: set(getattr(part, name)) for name in _HOOKS} for part in module.modules()}
    try:
        yield flags
    except BaseException:
        for part, before in hooks.items():
            for name, keys in before.items():
                registered = getattr(part, name)
                for key in [key for key in registered if key not in keys]:
                    del registered[key]
        for param, flag in flags.items():
            param.requires_grad_(flag)
        if untouched:
            _take_off(module)
        raise


def _copied(param: torch.nn.Parameter, flag: bool, memo: dict[int, Any]) -> torch.nn.Parameter:
    return type(param).__deepcopy__(param, memo).requires_grad_(flag)
