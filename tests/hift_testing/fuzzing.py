"""How much is fuzzed, and what has come: `make fuzz` sets HIFT_FUZZ (examples of each test) and HIFT_FUZZ_OUTPUT."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings

_MORE = int(os.environ.get("HIFT_FUZZ", "0"))
_BEGAN = time.monotonic()
COUNTS: dict[str, Counter[str]] = {}


def examples(few: int) -> Any:
    """So many in `make test`, always the same ones."""
    return settings(
        max_examples=_MORE or few, derandomize=not _MORE, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck), phases=list(Phase) if _MORE else [Phase.explicit, Phase.generate],
    )  # fmt: skip


def count(test: str, outcome: str) -> None:
    """One example has come out so."""
    COUNTS.setdefault(test, Counter())[outcome] += 1


def write_counts(exit_code: int) -> None:
    """At the end of a session, where HIFT_FUZZ_OUTPUT names a file."""
    output = os.environ.get("HIFT_FUZZ_OUTPUT")
    if output:
        from hift_ds.recipes.results import provenance

        found = {
            **provenance(torch.device("cpu")), "exit_code": int(exit_code),
            "seconds": round(time.monotonic() - _BEGAN), "examples": {name: dict(c) for name, c in COUNTS.items()},
        }  # fmt: skip
        Path(output).write_text(json.dumps(found, indent=1) + "\n")
