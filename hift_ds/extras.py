"""The packages that training does without: those of the extra `recipes` in pyproject.toml."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# By the names that are imported.
RECIPES = frozenset(
    {"accelerate", "datasets", "filelock", "gguf", "matplotlib", "mpi4py", "peft", "tensorboard", "transformers"}
)


@contextmanager
def needs_recipes() -> Iterator[None]:
    """Says in one sentence what to install where a package of the extra is missing.

    Raises:
        RuntimeError: It is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in RECIPES:
            raise
        raise RuntimeError(
            f"{package}: not installed, and training alone does without it; run "
            'pip install "hift_ds[recipes]" (in a checkout: pip install ".[recipes]")'
        ) from error
