"""Which cases of a test `make test` takes; the others are marked slow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from deepspeed.runtime import constants

# `gradient_allreduce_op` and `managed_gradient_accumulation`
newer_keys = pytest.mark.skipif(
    not hasattr(constants, "MANAGED_GRADIENT_ACCUMULATION"), reason="this DeepSpeed lacks the key, which is refused"
)
# DeepSpeed 0.18.5 divides the gradients of two micro steps twice (launch/results/2026-11-27_versions/README.md).
OWN_WINDOWS_ARE_RIGHT = hasattr(constants, "MANAGED_GRADIENT_ACCUMULATION")


def slow(*values: Any) -> Any:
    """A case for `make slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def diagonal(longer: Sequence[Any], shorter: Sequence[Any], start: int = 0) -> list[Any]:
    """All pairs; not slow are so many that each value of both is met: the diagonal that begins at `longer[start]`."""
    return [
        pytest.param(a, b) if (i - start - j) % len(shorter) == 0 else slow(a, b)
        for (i, a), (j, b) in itertools.product(enumerate(longer), enumerate(shorter))
    ]
