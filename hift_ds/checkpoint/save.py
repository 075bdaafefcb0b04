"""One save as the ranks go through it: written beside its place, described, put there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from hift_ds.checkpoint import folder, manifest
from hift_ds.checkpoint.tensor_files import FileFacts

REPORT_SECONDS = 1800.0  # that the ranks' disks may be apart, in a save in the background


@dataclass(frozen=True)
class Save:
    """One save.

    Attributes:
        root: The folder that the user has named.
        latest: "latest" shall name it.
        without_frozen: Frozen parameters are left out.
        keeps: This rank does what is done once a folder; on the others most of it is nothing.
    """

    root: Path
    tag: str
    latest: bool
    without_frozen: bool
    keeps: bool

    @property
    def place(self) -> Path:
        """Where it is written."""
        return self.root / folder.unfinished(self.tag)

    def describe(self, facts: Mapping[str, Any], files: Mapping[str, FileFacts]) -> None:
        """Writes the manifest."""
        if self.keeps:
            manifest.write(self.place, facts, files)

    def finish(self) -> None:
        """Puts it in its place."""
        if self.keeps:
            folder.finish(self.root, self.tag)
            if self.latest:
                folder.write_text(self.root / folder.LATEST, self.tag)

    def drop(self) -> None:
        """Removes it."""
        if self.keeps:
            folder.drop(self.root, self.tag)

    def begin_report(self, rank: int) -> IO[str]:
        """By this the rank that keeps the folder sees that this one still lives."""
        return folder.hold(self.place / f"rank_{rank}.writing")

    def report(self, rank: int, begun: IO[str], files: Mapping[str, FileFacts], error: Exception | None) -> None:
        """Tells it, by a file, what this rank has written."""
        found = {"files": {name: asdict(facts) for name, facts in files.items()}, "error": error and str(error)}
        folder.write_text(self.place / f"rank_{rank}.written", json.dumps(found))
        folder.let_go(begun)

    def conclude(self, world: int, facts: Mapping[str, Any]) -> None:
        """Waits for all reports, and finishes.

        Raises:
            RuntimeError: A rank has failed, has ended, or has not reported in time; nothing is left of the save.
        """
        files: dict[str, FileFacts] = {}
        errors: list[Exception] = []
        try:
            for rank in range(world):
                try:
                    files.update(self._reported(rank))
                except Exception as error:  # the others still write: what is dropped now would be there again
                    errors.append(error)
            if errors:
                raise errors[0]
            for path in self.place.glob("rank_*.writ*"):
                path.unlink()
            self.describe(facts, files)
            self.finish()
        except Exception:
            self.drop()
            raise

    def _reported(self, rank: int) -> dict[str, FileFacts]:
        written, writing = (self.place / f"rank_{rank}.{state}" for state in ("written", "writing"))
        report = json.loads(folder.read_when_there(written, writing, REPORT_SECONDS))
        if report["error"]:
            raise RuntimeError(f"rank {rank} failed to save in the background: {report['error']}")
        return {name: FileFacts(**of_file) for name, of_file in report["files"].items()}
