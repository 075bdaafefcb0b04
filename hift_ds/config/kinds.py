"""What a value of the "hift" section may be: the check, its words for messages, docs and the command line."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        check: Takes the key's name with its section and the value as JSON has it; returns what the config keeps, or
            raises ValueError or TypeError.
        allowed: What is allowed, as docs and `--help` say it.
        several: A list of strings, which a command line gives one after the other.
    """

    check: Callable[[str, Any], Any]
    allowed: str
    several: bool = False

    def or_null(self) -> Kind:
        """The same, or null."""
        return Kind(
            lambda key, value: None if value is None else self.check(key, value), f"{self.allowed}, or null",
            self.several,
        )  # fmt: skip


def key(default: Any, kind: Kind, description: str) -> Any:
    """Declares a key of a config dataclass: the only place that says what it is. A default of `...`: required."""
    default = MISSING if default is ... else default
    return field(default=default, metadata={"kind": kind, "description": description})


def declared(cls: type) -> list[Field]:
    """The keys of a config dataclass."""
    return [part for part in fields(cls) if "kind" in part.metadata]


def document(cls: type) -> type:
    """A decorator: adds the keys to the docstring."""
    lines = [
        textwrap.fill(f"{part.name}: {part.metadata['description']}", 120, initial_indent=8 * " ",
                      subsequent_indent=12 * " ")
        for part in declared(cls)
    ]  # fmt: skip
    cls.__doc__ = f"{cls.__doc__}\n\n    Attributes:\n" + "\n".join(lines) + "\n    "
    return cls


def default_of(part: Field) -> str:
    """A key's default as JSON."""
    if part.default is MISSING:
        return "(required)"
    if is_dataclass(part.default):
        return "{}"
    return json.dumps(part.default[0] if part.default and isinstance(part.default, tuple) else part.default)


def read_section(cls: type, name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """The checked values of an object of the config.

    Raises:
        ValueError, TypeError: An unknown key, or a value that its kind refuses.
    """
    kinds = {part.name: part.metadata["kind"] for part in declared(cls)}
    for unknown in (name for name in section if name not in kinds):
        close = difflib.get_close_matches(str(unknown), kinds, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"{name}.{unknown}={section[unknown]!r}: unknown key; {hint}allowed are {', '.join(kinds)}")
    return {part: kinds[part].check(f"{name}.{part}", value) for part, value in section.items()}


def boolean() -> Kind:
    """True or false."""

    def check(key: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError(f"{key}={value!r}: must be true or false")
        return value

    return Kind(check, "true or false")


def whole(least: int) -> Kind:
    """A whole number of `least` or more."""

    def check(key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{key}={value!r}: must be a whole number, {least} or more")
        if value < least:
            raise ValueError(f"{key}={value!r}: must be {least} or more")
        return value

    return Kind(check, f"a whole number, {least} or more")


def one_of(*allowed: str) -> Kind:
    """One of some strings."""

    def check(key: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            close = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{key}={value!r}: must be one of {', '.join(map(repr, allowed))}{hint}")
        return value

    return Kind(check, ", ".join(f'"{value}"' for value in allowed))


def regexes() -> Kind:
    """A list of regexes on parameter names; an empty one is none."""

    def check(key: str, value: Any) -> tuple[str, ...] | None:
        if not _is_list_of_strings(value):
            raise TypeError(f"{key}={value!r}: must be null or a list of regexes on parameter names")
        return tuple(value) or None

    return Kind(check, "a list of regexes", several=True)


def regexes_or(word: str) -> Kind:
    """A list of regexes, in which a word may stand, too; the word alone, or null, is a list of it."""

    def check(key: str, value: Any) -> tuple[str, ...]:
        if value is None or value == word:
            return (word,)
        if not _is_list_of_strings(value):
            raise TypeError(f"{key}={value!r}: must be null, {word!r} or a list of regexes on parameter names")
        return tuple(value)

    return Kind(check, f'"{word}" (null, too), or a list of regexes with or without "{word}"', several=True)


def lists_of_regexes() -> Kind:
    """Blocks, each a list of regexes on parameter names."""
    rule = "must be null or a list of blocks, each a list of one or more regexes on parameter names"

    def check(key: str, value: Any) -> tuple[tuple[str, ...], ...]:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise TypeError(f"{key}={value!r}: {rule}")
        for index, block in enumerate(value):
            if not _is_list_of_strings(block):
                raise TypeError(f"{key}[{index}]={block!r}: {rule}")
        if not value or not all(value):
            raise ValueError(f"{key}={value!r}: {rule}; an empty list holds no parameter")
        return tuple(tuple(block) for block in value)

    return Kind(check, "a list of lists of regexes")


def section(read: Callable[[Mapping[str, Any]], Any], example: str) -> Kind:
    """An object of its own keys; `read` checks it."""

    def check(key: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise TypeError(f"{key}={value!r}: must be null or an object such as {example}")
        return read(value)

    return Kind(check, "an object")


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
