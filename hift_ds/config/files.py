"""Reads a DeepSpeed config from wherever DeepSpeed would."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hjson


def load_ds_config(source: Any) -> Any:
    """Reads a DeepSpeed config as DeepSpeed does: a mapping, a file (JSON, or Hjson with its comments), or base64.

    Returns:
        The config; a source that is none of these as it is, for DeepSpeed to refuse.

    Raises:
        ValueError: The file is not JSON, not an object, or has a key twice.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    if os.path.isfile(source):
        return _read_ds_config(Path(source))
    try:
        content = hjson.loads(base64.urlsafe_b64decode(os.fspath(source)).decode("utf-8"))
    except ValueError:
        return source
    return dict(content) if isinstance(content, Mapping) and content else source


def _read_ds_config(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"key {twice[0]!r} stands twice in one object")
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():  # Hjson takes it for an empty object
            raise ValueError("the file is empty")
        content = hjson.loads(text, object_pairs_hook=unique)
    except ValueError as error:  # also of decoding
        raise ValueError(f"DeepSpeed config {str(path)!r}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"DeepSpeed config {str(path)!r}: must be a JSON object, is a {type(content).__name__}")
    return content
