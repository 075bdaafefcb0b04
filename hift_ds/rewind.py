"""Puts everything that an object holds back as it was, in place: so that a scheduler can be asked what it will do.

What it holds is walked: attributes, containers, closures, the globals that its functions use, random states. Models,
optimizers and what libraries keep for themselves are left alone. What cannot be put back is named.
"""

from __future__ import annotations

import copy
import dis
import functools
import io
import random
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

MOST_OBJECTS = 10_000  # more than that is no scheduler, but a program
MOST_ELEMENTS = 1 << 20  # of a tensor or array
_LIBRARIES = ("torch", "deepspeed", "transformers", "accelerate", "numpy")
_CONSTANT = (
    int, float, complex, str, bytes, bool, type(None), range, slice, type(...), types.ModuleType, types.CodeType,
    types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip


class CannotRewind(Exception):
    """Names what holds state that cannot be put back."""


class Rewind:
    """Remembers what `root` holds; `back` restores it.

    Raises:
        CannotRewind: It holds a generator, an open file, a function that writes a global, or something else unknown.
    """

    def __init__(self, root: Any) -> None:
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}  # keeps what has been seen alive, so that no id is used twice
        self._copies: dict[int, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 does not like iterators to be copied
            pending = [root]
            while pending:
                part = pending.pop()
                if id(part) in self._seen:
                    continue
                self._seen[id(part)] = part
                if len(self._seen) > MOST_OBJECTS:
                    raise CannotRewind(f"it holds more than {MOST_OBJECTS} objects")
                pending.extend(self._visit(part))
        self._undo += [functools.partial(put, state()) for state, put in _global_random_states()]

    def back(self) -> None:
        """May be called once."""
        for undo in self._undo:
            undo()

    def _visit(self, part: Any) -> list[Any]:
        """Remembers one object's own state; returns what it holds."""
        if isinstance(part, _CONSTANT) or _is_boundary(part):
            return []
        if isinstance(part, type):
            return self._visit_class(part)
        if isinstance(part, types.FunctionType):
            return self._visit_function(part)
        if isinstance(part, types.MethodType):
            return [part.__self__, part.__func__]
        if isinstance(part, functools.partial):
            return [part.func, *part.args, *part.keywords.values(), vars(part)]
        if isinstance(part, (tuple, frozenset)) and type(part).__module__ == "builtins":
            return list(part)
        if isinstance(part, (types.GeneratorType, types.CoroutineType, io.IOBase)):
            raise CannotRewind(f"it holds a {type(part).__name__}")
        restored = self._random_or_array(part)
        if restored is not None:
            self._undo.append(restored)
            return []
        held = [*self._visit_container(part), *self._visit_attributes(part)]
        if not held and not _has_attributes(part) and not isinstance(part, _CONTAINERS) and not _is_harmless(part):
            raise CannotRewind(f"it holds a {type(part).__module__}.{type(part).__qualname__}")
        return held

    def _visit_container(self, part: Any) -> list[Any]:
        if isinstance(part, dict):
            saved = {key: self._kept(value) for key, value in part.items()}
            self._undo.append(lambda: (dict.clear(part), dict.update(part, saved)))
            return [*part.keys(), *part.values()]
        if isinstance(part, (list, deque)):
            items = [self._kept(value) for value in part]
            self._undo.append(lambda: (part.clear(), part.extend(items)))
            return list(part)
        if isinstance(part, (set, bytearray)):
            members = part.copy()
            fill = part.update if isinstance(part, set) else part.extend
            self._undo.append(lambda: (part.clear(), fill(members)))
            return list(part) if isinstance(part, set) else []
        return []

    def _visit_attributes(self, part: Any) -> list[Any]:
        held: list[Any] = []
        if hasattr(part, "__dict__"):
            saved = {name: self._kept(value) for name, value in vars(part).items()}
            held += vars(part).values()
            self._undo.append(lambda: (vars(part).clear(), vars(part).update(saved)))
        for name in _slots(type(part)):
            if hasattr(part, name):
                value = getattr(part, name)
                held.append(value)
                self._undo.append(functools.partial(object.__setattr__, part, name, self._kept(value)))
        if not _is_of_library(type(part).__module__):
            held.append(type(part))
        return held

    def _visit_class(self, part: type) -> list[Any]:
        """A user's class: counters that its instances share, and its methods."""
        if _is_of_library(part.__module__):
            return []
        held = []
        for name, value in list(vars(part).items()):
            value = getattr(value, "__func__", value)  # of static and class methods
            if isinstance(value, types.FunctionType):
                held.append(value)
            elif not name.startswith("__") and not hasattr(value, "__get__"):
                held.append(value)
                self._undo.append(functools.partial(setattr, part, name, self._kept(value)))
        return [*held, *part.__bases__]

    def _visit_function(self, part: types.FunctionType) -> list[Any]:
        held: list[Any] = [*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values(), vars(part)]
        for cell in part.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # empty
                continue
            held.append(value)
            self._undo.append(functools.partial(setattr, cell, "cell_contents", self._kept(value)))
        if _is_of_library(part.__module__):
            return held
        for code in _codes(part.__code__):
            for step in dis.get_instructions(code):
                if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                    raise CannotRewind(f"{part.__qualname__} writes the global {step.argval!r}")
                if step.opname == "LOAD_GLOBAL" and step.argval in part.__globals__:
                    held.append(part.__globals__[step.argval])
        return held

    def _kept(self, value: Any) -> Any:
        """What stands for `value` after `back`: itself, but a copy of an iterator, which cannot be turned back."""
        if not isinstance(value, Iterator) or isinstance(value, (types.GeneratorType, io.IOBase)):
            return value
        if _has_attributes(value) and not _is_of_library(type(value).__module__):
            return value  # a user's class: its attributes come back
        if id(value) not in self._copies:
            try:
                self._copies[id(value)] = copy.deepcopy(value)
            except Exception as error:
                raise CannotRewind(f"it holds a {type(value).__name__} that cannot be copied ({error})") from None
            self._seen[id(value)] = value
        return self._copies[id(value)]

    @staticmethod
    def _random_or_array(part: Any) -> Callable[[], None] | None:
        if isinstance(part, random.Random):
            return functools.partial(part.setstate, part.getstate())
        if hasattr(part, "bit_generator"):  # numpy's Generator
            source, state = part.bit_generator, copy.deepcopy(part.bit_generator.state)
            return functools.partial(setattr, source, "state", state)
        if hasattr(part, "get_state") and hasattr(part, "set_state"):  # torch's Generator, numpy's RandomState
            return functools.partial(part.set_state, part.get_state())
        if hasattr(part, "copy_") and hasattr(part, "detach"):  # a tensor
            _check_size(part.numel())
            tensor, saved = part.detach(), part.detach().clone()
            return lambda: tensor.copy_(saved)
        if type(part).__module__ == "numpy" and hasattr(part, "flags") and hasattr(part, "fill"):  # an array
            _check_size(part.size)
            return functools.partial(part.__setitem__, ..., part.copy()) if hasattr(part, "__setitem__") else _nothing
        return None


_CONTAINERS = (dict, list, deque, set, bytearray, tuple, frozenset)


def _is_boundary(part: Any) -> bool:
    """Models and engines, optimizers (the caller restores their param groups), parameters."""
    if isinstance(part, type):
        return False
    return (
        hasattr(part, "named_parameters")
        or hasattr(part, "param_groups")
        or (hasattr(part, "requires_grad") and bool(part.requires_grad))
    )


def _is_of_library(module: str | None) -> bool:
    top = (module or "").split(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names


def _is_harmless(part: Any) -> bool:
    """Of a library and without state of its own that a step could change: dtypes, locks, patterns, weak references."""
    return _is_of_library(type(part).__module__) and not isinstance(part, Iterator)


def _has_attributes(part: Any) -> bool:
    return hasattr(part, "__dict__") or bool(list(_slots(type(part))))


def _slots(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name in ("__dict__", "__weakref__"):
                continue
            private = name.startswith("__") and not name.endswith("__")
            yield f"_{base.__name__.lstrip('_')}{name}" if private else name


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _nothing() -> None:
    """A numpy scalar cannot change."""


def _check_size(numel: int) -> None:
    if numel > MOST_ELEMENTS:
        raise CannotRewind(f"it holds a tensor of {numel} elements")


def _global_random_states() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
    yield random.getstate, random.setstate
    if "numpy" in sys.modules:
        yield sys.modules["numpy"].random.get_state, sys.modules["numpy"].random.set_state
    if "torch" in sys.modules:
        yield sys.modules["torch"].get_rng_state, sys.modules["torch"].set_rng_state
