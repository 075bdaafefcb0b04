"""Where text data comes from: samples, files, folders and hub names, read into documents and conversations.

Nothing here knows a tokenizer. Files are read whole, as UTF-8; every error names the file and the line or byte.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SAMPLES = ("hift-faq", "python-stdlib")

# A text document, or the messages of a conversation.
Example = str | list[dict[str, str]]
# Training examples and held-out ones; None where the source brings no held-out part.
Parts = tuple[list[Example], list[Example] | None]

_TEXT_SUFFIXES = (".txt", ".md", ".py")
_ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_ALL_SUFFIXES = ", ".join(_TEXT_SUFFIXES + _ROW_SUFFIXES)
_QUESTION_ANSWER = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"))
_COLUMNS = "messages | question, answer | prompt, completion | instruction[, input], output | text"
_ROLES = ("system", "user", "assistant")
_HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "eval", "test")  # in order of preference
_HUB_NAME = re.compile(r"[\w-]+(/[\w.-]+)?(:[\w.-]+)?")

# No running text: tests, generated tables, bundled programs and packages.
_STDLIB_SKIPPED = re.compile(
    r"tests?|test_.*|idle_test|idlelib|lib2to3|site-packages|dist-packages|encodings|pydoc_data"
)


def read_examples(name: str, *, eval_fraction: float, max_bytes: int) -> Parts:
    """Read the examples of `name`; the forms of a name are those of `load_text_dataset`.

    `eval_fraction` and `max_bytes` concern "python-stdlib" alone, whose split goes by file.

    Raises:
        FileNotFoundError: no such file or folder, or a hub name that cannot be reached.
        ValueError: a file that is empty, not text, of an unknown extension or without known columns.
    """
    path = Path(name).expanduser()
    if name == "hift-faq":
        data = Path(__file__).parent / "data"
        parts: Parts = (_read_file(data / "hift_faq_train.jsonl"), _read_file(data / "hift_faq_eval.jsonl"))
    elif name == "python-stdlib":
        parts = _read_stdlib(eval_fraction, max_bytes)
    elif path.is_dir():
        parts = _read_folder(path)
    elif path.exists() or path.suffix in _TEXT_SUFFIXES + _ROW_SUFFIXES or not _HUB_NAME.fullmatch(name):
        parts = (_read_file(path), None)
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


def _read_stdlib(eval_fraction: float, max_bytes: int) -> Parts:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [sub for sub in subfolders if not _STDLIB_SKIPPED.fullmatch(sub)]
        files += [Path(folder, file) for file in names if file.endswith(".py")]
    # In the order of the names' hashes a part of the files is a fair sample, on every machine the same.
    hashed = sorted((hashlib.sha256(file.relative_to(root).as_posix().encode()).hexdigest(), file) for file in files)
    parts: dict[bool, list[Example]] = {False: [], True: []}
    room = {False: max_bytes * (1 - eval_fraction), True: max_bytes * eval_fraction}
    for digest, file in hashed:
        is_held_out = int(digest[:8], 16) < eval_fraction * 2**32
        content = file.read_bytes()
        if not content.strip() or len(content) > room[is_held_out]:
            continue
        try:
            parts[is_held_out].append(content.decode("utf-8"))
        except UnicodeDecodeError:  # a handful declare another encoding
            continue
        room[is_held_out] -= len(content)
    if not parts[False]:
        raise ValueError(
            f"dataset='python-stdlib': no sources within max_bytes={max_bytes} in {root}; name a text file or folder."
        )
    return parts[False], parts[True]


def _read_folder(folder: Path) -> Parts:
    visible = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    # A README beside the rows is no data.
    row_files = [path for path in visible if path.suffix in _ROW_SUFFIXES]
    if row_files:
        held_out_files = [path for path in row_files if _is_held_out(path)]
        train_files = [path for path in row_files if path not in held_out_files]
        if not train_files or not held_out_files:
            return [example for path in row_files for example in _read_file(path)], None
        return (
            [example for path in train_files for example in _read_file(path)],
            [example for path in held_out_files for example in _read_file(path)],
        )
    text_files = [path for path in visible if path.suffix in _TEXT_SUFFIXES and path.stat().st_size]
    if not text_files:
        raise ValueError(
            f"dataset={str(folder)!r}: the folder holds no file that ends in {_ALL_SUFFIXES}, or all are empty."
        )
    return [example for path in text_files for example in _read_documents(path)], None


def _is_held_out(path: Path) -> bool:
    return re.split(r"[-_.]", path.stem.lower())[-1] in _HELD_OUT_NAMES


def _read_file(path: Path) -> list[Example]:
    if not path.exists():
        raise FileNotFoundError(
            f"dataset={str(path)!r}: no such file or folder; name one, a hub data set or a sample "
            f"({', '.join(SAMPLES)})."
        )
    if path.suffix in _TEXT_SUFFIXES:
        examples: list[Example] = _read_documents(path)
    elif path.suffix in (".jsonl", ".json"):
        examples = _to_examples(_read_json(path))
    elif path.suffix in (".csv", ".tsv"):
        examples = _to_examples(_read_table(path))
    else:
        raise ValueError(f"{path}: extension {path.suffix!r} is unknown; a data file ends in {_ALL_SUFFIXES}.")
    if not examples:
        raise ValueError(f"{path}: the file is empty, or no row holds any text; fill it or name another one.")
    return examples


def _read_documents(path: Path) -> list[Example]:
    text = _read_text(path)
    return [text] if text.strip() else []


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


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = _read_text(path)
    if text.lstrip().startswith("["):
        rows = [(f"{path}, row {number}", row) for number, row in enumerate(_parse_json(text, path, 1), 1)]
    else:
        # Not splitlines(): a JSON string may hold the other line ends of Unicode.
        lines = enumerate(text.split("\n"), 1)
        rows = ((f"{path}, line {number}", _parse_json(line, path, number)) for number, line in lines if line.strip())
    for where, row in rows:
        if isinstance(row, dict):
            yield where, row
            continue
        raise ValueError(f"{where}: a row is a JSON object with the columns {_COLUMNS}, not {type(row).__name__}.")


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {first_line + error.lineno - 1}: not JSON ({error.msg} at column {error.colno}); "
            "write one object per line, or one list of objects."
        ) from None


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    else:
        reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
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


def _to_examples(rows: Iterable[tuple[str, dict[str, Any]]]) -> list[Example]:
    examples = (_to_example(where, row) for where, row in rows)
    return [example for example in examples if example is not None]


def _to_example(where: str, row: dict[str, Any]) -> Example | None:
    """Turn a row into an example; None if there is nothing to learn from."""
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
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
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
            f"or a sample ({', '.join(SAMPLES)})."
        ) from error
    finally:
        if had_bars:
            datasets.enable_progress_bars()
    train_name = "train" if "train" in splits else next(iter(splits))
    held_out_name = next((split for split in _HELD_OUT_NAMES if split in splits and split != train_name), None)
    return (
        _to_examples(_numbered(f"{name}, split {train_name}", splits[train_name])),
        _to_examples(_numbered(f"{name}, split {held_out_name}", splits[held_out_name])) if held_out_name else None,
    )


def _numbered(where: str, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows, 1):
        yield f"{where}, row {number}", row
