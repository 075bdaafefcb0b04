"""A checkpoint's folder: it is there as a whole, or not at all; the one that it replaces is there until then."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

UNFINISHED, REPLACED = ".unfinished", ".replaced"
LATEST = "latest"
_ASIDE = (UNFINISHED, REPLACED)
_HELD_HERE: set[Path] = set()


def unfinished(tag: str) -> str:
    """The tag under which a save writes."""
    return tag + UNFINISHED


def begin(save_dir: Path, tag: str) -> None:
    """An empty folder to write into; what an earlier save that was cut off has left is removed.

    Raises:
        RuntimeError: A save in the background writes there.
    """
    recover(save_dir, tag)
    folder = save_dir / unfinished(tag)
    if any(map(is_held, folder.glob("rank_*.writing"))):
        raise RuntimeError(
            f"save_checkpoint: {str(save_dir / tag)!r} is being written in the background by another engine: call its "
            "finish_saving() first, or save under another tag"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def finish(save_dir: Path, tag: str) -> None:
    """Puts what has been written in its place."""
    place, replaced = save_dir / tag, save_dir / (tag + REPLACED)
    sync(save_dir / unfinished(tag))
    if place.exists():
        place.rename(replaced)
    (save_dir / unfinished(tag)).rename(place)
    sync(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(save_dir: Path, tag: str) -> None:
    """After a save that was cut off between two renames: the old checkpoint is in its place again."""
    replaced = save_dir / (tag + REPLACED)
    if replaced.exists():
        if (save_dir / tag).exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(save_dir / tag)


def drop(save_dir: Path, tag: str) -> None:
    """Removes what a save that failed has written."""
    shutil.rmtree(save_dir / unfinished(tag), ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk."""
    part = path.with_name(path.name + UNFINISHED)
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def hold(path: Path) -> IO[str]:
    """A file that others can see to be held, until it is closed or this process ends, by SIGKILL, too.

    Raises:
        BlockingIOError: Another process holds it.
    """
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(f"{str(path)!r} is held by another process") from None
        return file  # a file system without locks
    file.truncate(0)
    file.write("held")
    file.flush()
    _HELD_HERE.add(path.absolute())
    return file


def let_go(file: IO[str]) -> None:
    """The inverse of `hold`."""
    _HELD_HERE.discard(Path(file.name).absolute())
    file.close()


def is_held(path: Path) -> bool:
    """Whether a living process, this one too, holds a file."""
    if path.absolute() in _HELD_HERE:  # to look at its lock would let it go
        return True
    with suppress(FileNotFoundError):  # its save has just ended
        return path.read_text(encoding="utf-8") == "held" and not is_let_go(path)
    return False


def is_let_go(path: Path) -> bool:
    """Whether the process that held a file has ended; not for one's own. Where nothing can be known it has not."""
    with suppress(OSError), path.open("r+", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file.read() == "held"
    return False


def read_when_there(path: Path, held: Path, seconds: float) -> str:
    """A file's text, as soon as `write_text` of another process, which meanwhile holds a file, has put it there.

    Raises:
        RuntimeError: It has not come: the process has ended, or so much time is over.
    """
    end = time.monotonic() + seconds
    while not path.is_file():
        if is_let_go(held) and not path.is_file():
            raise RuntimeError(f"{str(path)!r} does not come: the process that was to write it has ended")
        if time.monotonic() > end:
            raise RuntimeError(f"{str(path)!r} has not come in {seconds:.0f} s: is it on another disk?")
        time.sleep(0.02)
    return path.read_text(encoding="utf-8")


def latest_tag(load_dir: str | Path) -> str | None:
    """The tag in the file "latest", or `None` without such a file.

    Raises:
        RuntimeError: The file is empty.
    """
    latest = Path(load_dir, LATEST)
    if not latest.is_file():
        return None
    tag = latest.read_text(encoding="utf-8").strip()
    if not tag:
        raise RuntimeError(f"checkpoint {str(latest)!r} is empty: a save was cut off; say which tag to load")
    return tag


def prune(save_dir: Path, keep: int) -> None:
    """Removes all but the newest checkpoints, plain DeepSpeed's too; the one that "latest" names stays."""
    files = {path: list(path.glob("*_model_states.pt")) for path in save_dir.iterdir() if path.suffix not in _ASIDE}
    found = [path for path, inside in files.items() if inside]
    newest = sorted(found, key=lambda path: max(file.stat().st_mtime_ns for file in files[path]))[-keep:]
    for path in found:
        if path not in newest and path.name != latest_tag(save_dir):
            aside = path.rename(path.with_name(path.name + UNFINISHED))  # never half a checkpoint under its name
            shutil.rmtree(aside, ignore_errors=True)


def require_room(save_dir: Path, needed: int) -> None:
    """Raises OSError where a folder's disk has not so many bytes free."""
    free = shutil.disk_usage(save_dir).free
    if free < needed:
        raise OSError(
            f"save_checkpoint: {needed / 2**30:.1f} GiB are needed in {str(save_dir)!r} and {free / 2**30:.1f} GiB are "
            "free: free some, or name a folder on another disk; nothing has been written"
        )


def sync(folder: Path) -> None:
    """A folder's entries are on the disk, on file systems that can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems know no fsync of a folder
        pass
    finally:
        os.close(descriptor)
