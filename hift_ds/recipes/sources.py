"""Where text data comes from: a sample, files, folders and hub names, read into documents and conversations.

Nothing here knows a tokenizer. Files are read whole, as UTF-8; every error names the file and the line or byte. Not by
`datasets.load_dataset`, which changes data in silence: of an unquoted CSV cell `hello, world` it keeps ` world`, and
of JSON strings that look like dates it makes times (datasets 5.2). A hub name is read by it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# A text document, or the messages of a conversation.
Example = str | list[dict[str, str]]
# Training examples and held-out ones; None where the source brings no held-out part.
Parts = tuple[list[Example], list[Example] | None]
# A row of data and where it stands, for errors.
Rows = Iterable[tuple[str, Any]]

_TEXT_SUFFIXES = (".txt", ".md", ".py")
_ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_ALL_SUFFIXES = ", ".join(_TEXT_SUFFIXES + _ROW_SUFFIXES)
_QUESTION_ANSWER = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"))
_COLUMNS = "messages | [system, ]question, answer | prompt, completion | instruction[, input], output | text"
_ROLES = ("system", "user", "assistant")
_HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "eval", "test")  # in order of preference
SAMPLES = ("hift-faq", "hift-facts")
_HUB_NAME = re.compile(r"[\w-]+(/[\w.-]+)?(:[\w.-]+)?")


def sample_path(name: str, part: str) -> Path:
    """The file of a sample data set, one of SAMPLES; `part`: `train` or `eval`."""
    return Path(__file__).parent / "data" / f"{name.replace('-', '_')}_{part}.jsonl"


def sample_rows(name: str, part: str) -> list[dict[str, str]]:
    """The rows of a sample data set as they are: `question`, `answer`, `topic`."""
    return [json.loads(line) for line in sample_path(name, part).read_text(encoding="utf-8").splitlines()]


def read_examples(name: str) -> Parts:
    """Read the examples of `name`; the forms of a name are those of `load_text_dataset`.

    Raises:
        FileNotFoundError: no such file or folder, or a hub name that cannot be reached.
        ValueError: a file that is empty, not text, of an unknown extension or without known columns.
    """
    path = Path(name).expanduser()
    parts: Parts
    if name in SAMPLES:
        parts = _read_file(sample_path(name, "train")), _read_file(sample_path(name, "eval"))
    elif path.is_dir():
        parts = _read_folder(path)
    elif path.exists() or path.suffix in _TEXT_SUFFIXES + _ROW_SUFFIXES or not _HUB_NAME.fullmatch(name):
        parts = _read_file(path), None
    else:
        parts = _read_hub(name)
    if not parts[0]:
        raise ValueError(f"dataset={name!r}: no row holds any text; check the file, or name another one.")
    kinds = {type(example) for part in parts for example in part or []}
    if len(kinds) > 1:
        raise ValueError(
            f"dataset={name!r}: some rows are text and some are conversations; put them into two files and name one."
        )
    return parts


def _read_folder(folder: Path) -> Parts:
    visible = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    # A README beside the rows is no data.
    row_files = [path for path in visible if path.suffix in _ROW_SUFFIXES]
    files = row_files or [path for path in visible if path.suffix in _TEXT_SUFFIXES and path.stat().st_size]
    if not files:
        raise ValueError(
            f"dataset={str(folder)!r}: the folder holds no file that ends in {_ALL_SUFFIXES}, or all are empty."
        )
    held_out = [path for path in row_files if re.split(r"[-_.]", path.stem.lower())[-1] in _HELD_OUT_NAMES]
    if len(held_out) == len(row_files):
        held_out = []  # nothing would be left to train on
    train, evaluate = (
        [example for path in files if (path in held_out) == wanted for example in _read_file(path)]
        for wanted in (False, True)
    )
    return train, evaluate if held_out else None


def _read_file(path: Path) -> list[Example]:
    if not path.exists():
        raise FileNotFoundError(
            f"dataset={str(path)!r}: no such file or folder; name one, a hub data set "
            f"or a sample ({' or '.join(SAMPLES)})."
        )
    if path.suffix in _TEXT_SUFFIXES:
        text = _read_text(path)
        examples: list[Example] = [text] if text.strip() else []
    elif path.suffix in _ROW_SUFFIXES:
        examples = _to_examples(_read_json(path) if path.suffix.startswith(".json") else _read_table(path))
    else:
        raise ValueError(f"{path}: extension {path.suffix!r} is unknown; a data file ends in {_ALL_SUFFIXES}.")
    if not examples:
        raise ValueError(f"{path}: the file is empty, or no row holds any text; fill it or name another one.")
    return examples


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    # A NUL byte is legal UTF-8, but no text file holds one.
    offset = content.find(b"\0")
    if offset < 0:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            offset = error.start
    raise ValueError(
        f"{path}: not a text file (byte {content[offset]:#04x} at offset {offset}); data files are UTF-8, convert it."
    )


def _read_json(path: Path) -> Rows:
    text = _read_text(path)
    is_list = text.lstrip().startswith("[")
    # Not splitlines(): a JSON string may hold the other line ends of Unicode.
    for number, part in enumerate([text] if is_list else text.split("\n"), 1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number + error.lineno - 1}: not JSON ({error.msg} at column {error.colno}); "
                "write one object per line, or one list of objects."
            ) from None
        yield from _numbered(str(path), value) if is_list else [(f"{path}, line {number}", value)]


def _read_table(path: Path) -> Rows:
    # A tab cannot stand in a cell, so that nothing need be quoted.
    options: Any = {"strict": True} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), **options)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{where}: the row has not as many cells as the first line has columns "
                    f"({len(reader.fieldnames or [])}); quote cells that hold the separator."
                )
            yield where, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a table ({error}); repair it or use jsonl.") from None


def _to_examples(rows: Rows) -> list[Example]:
    examples = (_to_example(where, row) for where, row in rows)
    return [example for example in examples if example is not None]


def _to_example(where: str, row: Any) -> Example | None:
    """Turn a row into an example; None if there is nothing to learn from."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row is a JSON object with the columns {_COLUMNS}, not {type(row).__name__}.")
    if "messages" in row:
        return _check_messages(where, row["messages"])
    for question_column, answer_column in _QUESTION_ANSWER:
        if question_column in row and answer_column in row:
            question = _cell(where, row, question_column)
            if question_column == "instruction" and row.get("input"):
                question = f"{question}\n\n{_cell(where, row, 'input')}"
            answer = _cell(where, row, answer_column)
            if not answer.strip():
                return None
            system = [{"role": "system", "content": _cell(where, row, "system")}] if row.get("system") else []
            return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if "text" in row:
        text = _cell(where, row, "text")
        return text if text.strip() else None
    found = ", ".join(repr(column[:40]) for column in list(row)[:12])
    raise ValueError(f"{where}: the columns are {found}; a row needs {_COLUMNS}: name or rename them.")


def _cell(where: str, row: dict[str, Any], column: str) -> str:
    value = row[column]
    if isinstance(value, str):
        return value
    raise ValueError(f"{where}: {column}={value!r:.60} is not a string; quote it or drop the row.")


def _check_messages(where: str, messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise ValueError(
            f"{where}: messages={messages!r:.80} is not a list of objects with a role "
            f"({', '.join(_ROLES)}) and a string as content."
        )
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles[0] == "assistant":
        raise ValueError(
            f"{where}: the roles are {roles}; a conversation starts with system or user and has an assistant."
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _read_hub(name: str) -> Parts:
    import datasets

    repository, _, config = name.partition(":")
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(repository, config or None)
    except (OSError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"dataset={name!r}: no file or folder of that name here, and the hub did not deliver it "
            f"({str(error).strip().splitlines()[0]}); name a file, a folder, 'owner/name[:config]' "
            f"or a sample ({' or '.join(SAMPLES)})."
        ) from error
    finally:
        if had_bars:
            datasets.enable_progress_bars()
    train = "train" if "train" in splits else next(iter(splits))
    held_out = next((split for split in _HELD_OUT_NAMES if split in splits and split != train), None)
    parts = [_to_examples(_numbered(f"{name}, split {split}", splits[split])) for split in (train, held_out) if split]
    return parts[0], parts[1] if held_out else None


def _numbered(where: str, rows: Iterable[Any]) -> Rows:
    return ((f"{where}, row {number}", row) for number, row in enumerate(rows, 1))
