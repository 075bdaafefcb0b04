"""What a user reads: errors as text, and warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def error_of(action: Callable[[], Any]) -> str:
    """`Type: message` of what `action` raises, or nothing; the pool lives on."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# What python and torch raise where nobody thought of the case.
ACCIDENTS = ("AttributeError", "KeyError", "IndexError", "TypeError", "UnboundLocalError", "StopIteration")


def is_clear(error: str) -> bool:
    """A sentence, of a type that is meant for users."""
    return not error.startswith(ACCIDENTS) and len(error.split()) > 8


@contextmanager
def logged(*names: str) -> Iterator[list[str]]:
    """Messages of these loggers at level WARNING and above, inside `with`."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        yield found
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)


@contextmanager
def messages() -> Iterator[list[str]]:
    """What hift_ds and DeepSpeed log, and what comes through `warnings`."""
    with warnings.catch_warnings(record=True) as caught, logged("hift_ds", "DeepSpeed") as found:
        warnings.simplefilter("always")
        try:
            yield found
        finally:
            found.extend(str(warning.message) for warning in caught)
