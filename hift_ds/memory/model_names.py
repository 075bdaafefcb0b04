"""What a model's name stands for: a folder, a file or a model of the hub; and the config that is found there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hift_ds.extras import needs_recipes


def local_model(name: str, instead: str, files: bool = False) -> Path | None:
    """The folder that a name stands for; `None`: a name that only the hub can know.

    Args:
        instead: What may be named, for the error.
        files: A file is one, too.

    Raises:
        FileNotFoundError: There is none, or the folder is no model's.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"model={name!r}: the folder holds no config.json; name {instead}")
    if path.is_dir() or (files and path.is_file()):
        return path
    # A hub name is "name" or "owner/name"; anything else can only be meant as a folder or a file.
    no_hub_name = path.is_absolute() or name.startswith(".") or name.count("/") > 1 or name.endswith(".json")
    if path.exists() or no_hub_name:
        kind = "file or folder" if files else "folder"
        raise FileNotFoundError(f"model={name!r}: no such {kind}; name {instead}, or a hub name")
    return None


@contextmanager
def asking_the_hub(name: str, instead: str) -> Iterator[None]:
    """Turns the errors of a hub name that cannot be had into one sentence; those of a local model pass through."""
    try:
        yield
    except (OSError, ValueError) as error:
        if Path(name).expanduser().exists():
            raise
        raise FileNotFoundError(
            f"model={name!r}: no folder of that name here, and the hub did not deliver it "
            f"({str(error).strip().splitlines()[0]}); without network name {instead}"
        ) from error


@needs_recipes()
def load_config(name: str) -> Any:
    """The transformers config of a hub name, a folder or a config.json.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A file that is no model's config.
    """
    from transformers import AutoConfig

    instead = "a config.json or a folder with one"
    path = local_model(name, instead, files=True)
    if path is not None:
        return _read_config(path / "config.json" if path.is_dir() else path)
    with asking_the_hub(name, instead):
        return AutoConfig.from_pretrained(name)


def _read_config(path: Path) -> Any:
    from transformers import AutoConfig

    wrong = f"model={str(path)!r}: not the config of a model that transformers knows"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content.pop("model_type")
        config = AutoConfig.for_model(kind)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f'{wrong}; it must be JSON with a "model_type"') from None
    try:
        return type(config).from_dict(content)
    except Exception as error:  # huggingface_hub's validation has errors of its own
        raise ValueError(f"{wrong} ({str(error).strip().splitlines()[-1].strip()}); mend the value") from None
