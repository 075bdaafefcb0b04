"""Puts everything that an object holds back as it was, in place: so that a scheduler can be asked what it will do.

What it holds is walked: attributes, containers, closures, classes, the globals that its functions use, random states.
Models, parameters, data loaders and what libraries keep for themselves are left alone. A kind of object that is not
known to be put back is named.
"""

from __future__ import annotations

import array
import copyreg
import datetime
import decimal
import dis
import enum
import functools
import inspect
import logging
import operator
import random
import re
import sys
import threading
import types
import warnings
import weakref
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

MOST_OBJECTS = 3000  # 0.8 s a cycle on one CPU core where they are tensors; a scheduler has some 50
MOST_ELEMENTS = 1 << 20  # of all tensors and arrays
_LIBRARIES = {"torch", "deepspeed", "transformers", "accelerate", "numpy", "hift_ds", *sys.stdlib_module_names}
_SCALARS = {int, float, complex, str, bytes, bool, type(None)}
_CONSTANT = (
    *_SCALARS, range, slice, type(...), type(NotImplemented), enum.Enum, decimal.Decimal, datetime.date, datetime.time,
    datetime.timedelta, datetime.tzinfo, re.Pattern, operator.itemgetter, operator.attrgetter, operator.methodcaller,
    type(threading.Lock()), type(threading.RLock()), types.CodeType, types.GenericAlias,
    types.UnionType, types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType, type(vars(namedtuple("_", "field"))["field"]),
    types.ModuleType,  # by the names that a function uses: `_visit_names`
)  # fmt: skip
# What holds others under these names and nothing else that changes.
_HOLDERS = {
    types.MethodType: ("__self__", "__func__"),
    types.BuiltinFunctionType: ("__self__",),
    types.MethodWrapperType: ("__self__",),
    functools.partial: ("func", "args", "keywords", "__dict__"),
    functools.partialmethod: ("func", "args", "keywords"),
    functools.cached_property: ("func",),
    functools._lru_cache_wrapper: ("__wrapped__",),
    property: ("fget", "fset", "fdel"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
}
_REACHES_OUT = {"open", "print", "write_text", "write_bytes"}  # once for each step that is only looked at
_MISSING = object()


class CannotRewind(Exception):
    """Names what holds state that cannot be put back."""


class Rewind:
    """Remembers what `roots` hold; `back` restores it.

    Raises:
        CannotRewind: They hold a generator, an open file, or something else unknown; nothing has been changed.
    """

    def __init__(self, *roots: Any) -> None:
        self._undo: list[Callable[[], Any]] = []
        self._seen = {id(root): root for root in roots}  # keeps what has been seen alive: no id is used twice
        self._copies: dict[int, tuple[Any, Any]] = {}
        self._pending: list[Any] = []
        self._elements = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 does not like iterators to be copied
            try:
                for root in roots:
                    self._visit(root)  # also where it looks like a model or an optimizer
                while self._pending:
                    self._visit_once(self._pending.pop())
                for state, put in _global_random_states():
                    self._undo.append(functools.partial(put, state()))
            except CannotRewind:
                self.back()
                raise
            except Exception as error:  # of the user's own objects: properties, __getattr__
                self.back()
                raise CannotRewind(f"reading what it holds: {error!r}") from error

    def back(self) -> None:
        """May be called once."""
        for undo in self._undo:
            undo()

    def _visit_once(self, part: Any) -> None:
        if type(part) in _SCALARS or id(part) in self._seen:
            return
        self._seen[id(part)] = part
        if len(self._seen) > MOST_OBJECTS:
            raise CannotRewind(f"it holds more than {MOST_OBJECTS} objects")
        if not self._stop_at(part):
            self._visit(part)

    def _hold(self, value: Any) -> Any:
        """What stands for `value` after `back`: itself, visited in its turn, but a copy of an iterator written in C."""
        if type(value) in _SCALARS:
            return value
        if isinstance(value, Iterator) and not _only_attributes(type(value)):
            return self._copied(value)
        self._pending.append(value)
        return value

    def _copied(self, iterator: Any) -> Any:
        """An iterator that goes on as this one does, over the same objects; one for all who share it."""
        if id(iterator) not in self._copies:
            try:
                make, arguments, *state = iterator.__reduce__()
            except Exception as error:
                name = type(iterator).__qualname__
                raise CannotRewind(f"it holds a {name} that cannot be copied ({error})") from None
            copied = make(*map(self._hold, arguments))
            if state and state[0] is not None:
                whole = state[0]
                copied.__setstate__(tuple(map(self._hold, whole)) if isinstance(whole, tuple) else self._hold(whole))
            self._copies[id(iterator)] = iterator, copied
        return self._copies[id(iterator)][1]

    def _stop_at(self, part: Any) -> bool:
        """Models, engines, optimizers: their own attributes, an optimizer's param groups, and nothing below."""
        kind = type(part)
        if not (hasattr(kind, "named_parameters") or (hasattr(kind, "zero_grad") and hasattr(part, "param_groups"))):
            return isinstance(part, (_of_torch("nn.Parameter"), _of_torch("utils.data.DataLoader")))
        for inner in part.modules() if hasattr(kind, "named_parameters") else [part]:
            if hasattr(inner, "__dict__"):
                self._undo.append(functools.partial(_restore_attributes, inner, dict(vars(inner))))
        if not hasattr(kind, "named_parameters"):
            self._pending += [part.param_groups, getattr(part, "defaults", None)]
        return True

    def _visit(self, part: Any) -> None:
        """Remembers one object's own state and holds what it holds."""
        kind = type(part)
        if isinstance(part, _CONSTANT):
            return
        if isinstance(part, logging.Logger):  # silent until `back`
            self._undo.append(functools.partial(setattr, part, "disabled", part.disabled))
            part.disabled = True
        elif isinstance(part, type):
            self._visit_class(part)
        elif isinstance(part, types.FunctionType):
            self._visit_function(part)
        elif kind in _HOLDERS:
            self._pending += [getattr(part, name) for name in _HOLDERS[kind]]
        elif isinstance(part, weakref.ref):
            self._pending.append(part())
        elif isinstance(part, types.MappingProxyType):
            self._pending += [*part.keys(), *part.values()]
        elif not self._visit_numbers(part):
            is_container = self._visit_container(part)
            if not is_container and not _only_attributes(kind):
                raise CannotRewind(f"it holds a {_name(kind)}")
            self._visit_attributes(part)
            self._pending.append(kind)

    def _visit_container(self, part: Any) -> bool:
        if isinstance(part, (tuple, frozenset)):
            self._pending += part
        elif isinstance(part, dict):
            base = OrderedDict if isinstance(part, OrderedDict) else dict
            is_group = "params" in part and "lr" in part  # an optimizer's: its parameters stay
            saved = {key: value if is_group and key == "params" else self._hold(value) for key, value in part.items()}
            self._pending += [*saved, getattr(part, "default_factory", None)]
            self._undo.append(lambda: (base.clear(part), base.update(part, saved)))
        elif isinstance(part, (list, deque)):
            items = [self._hold(value) for value in part]
            self._undo.append(functools.partial(_restore_items, part, list if isinstance(part, list) else deque, items))
        elif isinstance(part, set):
            members = set(part)
            self._pending += members
            self._undo.append(lambda: (set.clear(part), set.update(part, members)))
        elif isinstance(part, (bytearray, array.array)):
            self._undo.append(functools.partial(part.__setitem__, slice(None), part[:]))
        else:
            return False
        return True

    def _visit_attributes(self, part: Any) -> None:
        if hasattr(part, "__dict__"):
            saved = {name: self._hold(value) for name, value in vars(part).items()}
            self._undo.append(functools.partial(_restore_attributes, part, saved))
        for name in _slot_names(type(part)):
            slot = inspect.getattr_static(type(part), name)
            value = self._hold(getattr(part, name, _MISSING))
            self._undo.append(functools.partial(_restore_slot, part, slot, value))

    def _visit_class(self, part: type) -> None:
        """A user's class: counters that its instances share, and its methods."""
        if _is_of_library(part.__module__):
            return
        saved = {}
        for name, value in vars(part).items():
            if _is_own(name):
                saved[name] = self._hold(value)
            elif isinstance(value, (types.FunctionType, staticmethod, classmethod)):
                self._pending.append(value)
        self._undo.append(functools.partial(_restore_class, part, saved))
        self._pending += part.__bases__

    def _visit_function(self, part: types.FunctionType) -> None:
        self._pending += [part.__defaults__, part.__kwdefaults__, vars(part)]
        values = []
        for cell in part.__closure__ or ():
            try:
                values.append(cell.cell_contents)
            except ValueError:  # empty
                continue
            self._undo.append(functools.partial(setattr, cell, "cell_contents", self._hold(values[-1])))
        if _is_of_library(part.__module__):
            return
        names, attributes, imports = _names(part.__code__)
        outside = sorted(_REACHES_OUT & names - part.__globals__.keys() | _REACHES_OUT & attributes - names)
        if outside:
            raise CannotRewind(f"{part.__qualname__} calls {outside[0]}()")
        values += self._visit_names(part.__globals__, names)
        values += [sys.modules.get(name) for name in imports]
        for value in values:
            self._visit_module(value, attributes)

    def _visit_module(self, module: Any, names: frozenset[str]) -> None:
        """Of a user's module what a function that knows it can mean by its names."""
        if isinstance(module, types.ModuleType) and not _is_of_library(module.__name__):
            for value in self._visit_names(vars(module), names):
                if isinstance(value, types.ModuleType) and value.__name__.startswith(f"{module.__name__}."):
                    self._visit_module(value, names)

    def _visit_names(self, namespace: dict[str, Any], names: frozenset[str]) -> list[Any]:
        values = {name: namespace[name] for name in names if name in namespace}
        saved = {name: self._hold(value) for name, value in values.items()}
        self._undo.append(functools.partial(_restore_names, namespace, names, saved))
        return list(values.values())

    def _visit_numbers(self, part: Any) -> bool:
        """Random states, tensors and arrays, and torch's and numpy's objects that are neither."""
        if isinstance(part, random.Random):
            self._undo.append(functools.partial(part.setstate, part.getstate()))
            return True
        if type(part).__module__.split(".")[0] not in ("torch", "numpy"):
            return False
        bits = getattr(part, "bit_generator", part)  # of numpy's Generator
        if hasattr(bits, "random_raw"):
            self._undo.append(functools.partial(setattr, bits, "state", bits.state))
        elif hasattr(part, "get_state") and hasattr(part, "set_state"):  # torch's Generator, numpy's RandomState
            self._undo.append(functools.partial(part.set_state, part.get_state()))
        elif isinstance(part, _of_torch("Tensor")):
            self._visit_tensor(part.detach())
        elif hasattr(part, "__array_interface__") and hasattr(part, "base"):
            self._visit_array(part)
        else:
            return not (_only_attributes(type(part)) or isinstance(part, tuple))
        return True

    def _visit_tensor(self, tensor: Any) -> None:
        self._count(tensor.numel())
        if tensor.layout != sys.modules["torch"].strided or 0 in tensor.stride() or tensor.is_meta:
            raise CannotRewind("it holds a sparse, expanded or meta tensor")
        saved = tensor.clone()
        self._undo.append(lambda: None if tensor.equal(saved) else tensor.copy_(saved))

    def _visit_array(self, part: Any) -> None:
        if not hasattr(part, "__setitem__"):
            return  # a scalar
        if type(part).__name__ not in ("ndarray", "memmap") or part.dtype.hasobject:
            raise CannotRewind(f"it holds a {_name(type(part))} of {part.dtype}")
        self._count(part.size)
        self._pending.append(part.base)
        if part.flags.writeable:
            self._undo.append(functools.partial(part.__setitem__, ..., part.copy()))

    def _count(self, numel: int) -> None:
        self._elements += numel
        if self._elements > MOST_ELEMENTS:
            raise CannotRewind(f"it holds tensors of {self._elements} elements")


def _only_attributes(kind: type) -> bool:
    """Whether instances are their attributes and slots and keep nothing in C; as `object.__reduce_ex__` decides."""
    pointers = bool(kind.__dictoffset__) + bool(kind.__weakrefoffset__) + len(_slot_names(kind))
    return not kind.__itemsize__ and kind.__basicsize__ <= object.__basicsize__ + pointers * (object.__basicsize__ // 2)


def _slot_names(kind: type) -> list[str]:
    return copyreg._slotnames(kind)  # type: ignore[attr-defined]  # private: typeshed leaves it out


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The globals that a function uses, every name that it mentions, the modules that it imports; with inner ones."""
    found, mentioned, imports = set(), set(code.co_names), set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
            found.add(step.argval)
        elif step.opname == "IMPORT_NAME":
            imports.add(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            for mine, inner in zip((found, mentioned, imports), _names(constant), strict=True):
                mine |= inner
    return frozenset(found), frozenset(mentioned), frozenset(imports)


def _restore_items(part: Any, base: type[list[Any]] | type[deque[Any]], items: list[Any]) -> None:
    # An iterator over a deque does not go on after any change.
    if len(part) != len(items) or any(present is not item for present, item in zip(part, items, strict=True)):
        base.clear(part)
        base.extend(part, items)


def _restore_attributes(part: Any, saved: dict[str, Any]) -> None:
    present = vars(part)
    if list(present) != list(saved) or any(present[name] is not value for name, value in saved.items()):
        present.clear()
        present.update(saved)


def _restore_slot(part: Any, slot: Any, value: Any) -> None:
    if value is not _MISSING:
        slot.__set__(part, value)
    elif hasattr(part, slot.__name__):
        slot.__delete__(part)


def _restore_class(part: type, saved: dict[str, Any]) -> None:
    # Not by the class's own __setattr__: an enumeration's refuses.
    for name in [name for name in vars(part) if _is_own(name) and name not in saved]:
        type.__delattr__(part, name)
    for name, value in saved.items():
        if vars(part).get(name, _MISSING) is not value:
            type.__setattr__(part, name, value)


def _restore_names(namespace: dict[str, Any], names: frozenset[str], saved: dict[str, Any]) -> None:
    for name in names:
        if name in saved:
            namespace[name] = saved[name]
        else:
            namespace.pop(name, None)


def _is_own(name: str) -> bool:
    return not name.startswith("__") and name != "_abc_impl"


def _is_of_library(module: str | None) -> bool:
    return (module or "").split(".")[0] in _LIBRARIES


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _of_torch(name: str) -> Any:
    """A class of torch, where it has been imported; none otherwise."""
    return operator.attrgetter(name)(sys.modules["torch"]) if "torch" in sys.modules else ()


def _global_random_states() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
    yield random.getstate, random.setstate
    if "numpy" in sys.modules:
        yield sys.modules["numpy"].random.get_state, sys.modules["numpy"].random.set_state
    if "torch" in sys.modules:
        yield sys.modules["torch"].get_rng_state, sys.modules["torch"].set_rng_state
