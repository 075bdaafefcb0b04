"""`hift.json`: what a checkpoint is of, and what every one of its files must be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hift_ds import __version__
from hift_ds.checkpoint.folder import write_text
from hift_ds.checkpoint.tensor_files import FileFacts, facts_of

FORMAT = 4
MANIFEST = "hift.json"
READERS = 4  # threads that read files to check them
DAMAGED = "it was cut off or damaged; load another tag"


def versions() -> dict[str, str]:
    """What a checkpoint is written by."""
    return {"hift_ds": __version__, **{name: version(name) for name in ("deepspeed", "torch")}}  # it may be a checkout


def write(folder: Path, content: Mapping[str, Any], files: Mapping[str, FileFacts]) -> None:
    """Writes the manifest of a checkpoint whose files are all there."""
    listed = {name: {"bytes": facts.num_bytes, "sha256": facts.sha256} for name, facts in sorted(files.items())}
    whole = {"format": FORMAT, **content, "files": listed}
    write_text(folder / MANIFEST, json.dumps({**whole, "sha256": _digest(whole)}, indent=1))


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; `None` if HiFT has not written it.

    Raises:
        ValueError: No such folder.
        RuntimeError: A manifest that cannot be read, or of another format.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {str(folder)!r}: no such folder; check load_dir and tag")
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
    except (ValueError, TypeError, KeyError):
        raise RuntimeError(f"checkpoint file {str(path)!r} cannot be read: {DAMAGED}") from None
    if found == FORMAT and content.pop("sha256", None) != _digest(content):
        raise RuntimeError(f"checkpoint file {str(path)!r} is not as it was written: {DAMAGED}")
    return content


def identity(folder: Path) -> tuple[int, int] | None:
    """Another one where another save has taken the folder's place."""
    path = folder / MANIFEST
    found = path.stat() if path.is_file() else None
    return None if found is None else (found.st_ino, found.st_mtime_ns)


def require_still(folder: Path, before: tuple[int, int] | None) -> None:
    """Raises RuntimeError where a folder has another `identity` than before."""
    if identity(folder) != before:
        raise RuntimeError(
            f"checkpoint {str(folder)!r} was replaced while it was loaded, and weights and state may be of both: end "
            "the run that saves there, and load it again"
        )


def verify(folder: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Reads files through and compares them with the manifest.

    Raises:
        RuntimeError: One is missing or not as it was written.
    """
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda name: _verify(folder / name, manifest["files"][name]), names):
            pass


def _verify(path: Path, wanted: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise RuntimeError(f"checkpoint file {str(path)!r} is missing: load another tag")
    size = path.stat().st_size
    if size != wanted["bytes"]:
        raise RuntimeError(
            f"checkpoint file {str(path)!r} has {size:,} bytes and was written with {wanted['bytes']:,}: {DAMAGED}"
        )
    if facts_of(path).sha256 != wanted["sha256"]:
        raise RuntimeError(f"checkpoint file {str(path)!r} is not as it was written (sha256): {DAMAGED}")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
