"""What the meter has found on all ranks: one table, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from operator import attrgetter, itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hift_ds.memory.figures import MEASURED_ROLES, PHASES, mib

ON_CUDA = "torch's CUDA allocator"
ON_CPU = "tensors counted on a CPU: not GPU memory"
OF_ALLOCATOR = ("active", "reserved", "requested")  # what only CUDA's allocator knows


@dataclass(frozen=True)
class Sample:
    """The highest peak of one phase while one block trained; bytes.

    Attributes:
        block: Its index; -1 in full fine-tuning.
        allocated: Most bytes of tensors, and the roles that make them up.
        active: Most bytes of tensors and of freed ones that a stream still uses; None where there is no such allocator.
        reserved: Most bytes that the allocator held; likewise.
        requested: Most bytes that were asked for, before the allocator rounds them up; likewise.
    """

    block: int
    phase: str
    allocated: int
    weights: int
    gradients: int
    state: int
    activations: int
    other: int
    active: int | None = None
    reserved: int | None = None
    requested: int | None = None

    def joined(self, other: Sample) -> Sample:
        """The higher of the two; of what only the allocator knows the highest of each."""
        highest = max(self, other, key=lambda sample: sample.allocated)
        most: dict[str, Any] = {name: _most(getattr(sample, name) for sample in (self, other)) for name in OF_ALLOCATOR}
        return replace(highest, **most)


@dataclass(frozen=True)
class RankRecord:
    """What one rank has measured, and where it was."""

    rank: int
    node: str
    device: str
    kind: str
    samples: tuple[Sample, ...]

    @property
    def peak(self) -> Sample | None:
        """The highest of all."""
        return max(self.samples, key=lambda sample: sample.allocated, default=None)


@dataclass(frozen=True)
class Report:
    """All ranks' peaks.

    Attributes:
        ranks: By rank.
        blocks: Names of the blocks; empty in full fine-tuning.
    """

    ranks: tuple[RankRecord, ...]
    blocks: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Most bytes of tensors on any rank."""
        return max((record.peak.allocated for record in self.ranks if record.peak is not None), default=0)

    def of_allocator(self) -> dict[str, int | None]:
        """The most of each of `OF_ALLOCATOR` on any rank; None where there is no such allocator."""
        samples = [sample for record in self.ranks for sample in record.samples]
        return {name: _most(getattr(sample, name) for sample in samples) for name in OF_ALLOCATOR}

    @property
    def kind(self) -> str:
        """How it was measured."""
        return self.ranks[0].kind

    def block_peaks(self, of: str = "allocated") -> dict[int, int]:
        """Most bytes of tensors on any rank, by block; with `of` another figure of a sample."""
        peaks: dict[int, int] = {}
        for record in self.ranks:
            for sample in record.samples:
                peaks[sample.block] = max(peaks.get(sample.block, 0), getattr(sample, of))
        return peaks

    def table(self) -> Table:
        """Peaks by phase and, at the highest, by role: least, mean and most over ranks, which rank and which block."""
        table = Table(
            title=f"Peak memory of {len(self.ranks)} ranks, MiB", caption=self.kind, box=SIMPLE_HEAD, show_edge=False,
            pad_edge=False, padding=(0, 1, 0, 0),
        )  # fmt: skip
        table.add_column("")
        for header in ("min", "mean", "max", "rank"):
            table.add_column(header, justify="right")
        table.add_column("block", overflow="ellipsis", no_wrap=True, max_width=28)
        for phase in PHASES:
            self._row(table, phase, [self._highest(record, phase) for record in self.ranks], "allocated")
        table.add_section()
        highest = [record.peak for record in self.ranks]
        for role in MEASURED_ROLES:
            label = "activations, buckets" if role == "activations" else role
            self._row(table, f"{label} at the peak", highest, role)
        table.add_section()
        self._row(table, "allocated", highest, "allocated")
        for name in ("active", "reserved"):
            known = [[s for s in record.samples if getattr(s, name) is not None] for record in self.ranks]
            self._row(table, name, [max(samples, key=attrgetter(name), default=None) for samples in known], name)
        return table

    def to_json(self) -> dict[str, Any]:
        """Everything in bytes."""
        return {
            "kind": self.kind, "peak_allocated": self.peak,
            **{f"peak_{name}": most for name, most in self.of_allocator().items()},
            "blocks": list(self.blocks),
            "ranks": [{**asdict(record), "samples": [asdict(s) for s in record.samples]} for record in self.ranks],
        }  # fmt: skip

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Report:
        """The inverse of `to_json`."""
        ranks = (
            RankRecord(**{**record, "samples": tuple(Sample(**sample) for sample in record["samples"])})
            for record in content["ranks"]
        )
        return cls(tuple(ranks), tuple(content["blocks"]))

    def write(self, path: str | Path) -> None:
        """Writes `to_json` to a file; its folder is made."""
        write_json(Path(path), self.to_json())

    def _highest(self, record: RankRecord, phase: str) -> Sample | None:
        return max((s for s in record.samples if s.phase == phase), key=lambda s: s.allocated, default=None)

    def _row(self, table: Table, label: str, samples: list[Sample | None], key: str) -> None:
        known = [(getattr(s, key), s.block, index) for index, s in enumerate(samples) if s is not None]
        if not known:
            return
        most, block, index = max(known, key=itemgetter(0))
        name = self.blocks[block] if 0 <= block < len(self.blocks) else "all"
        numbers = (min(known)[0], mean(value for value, *_ in known), most)
        table.add_row(label, *(mib(n) for n in numbers), str(self.ranks[index].rank), name)


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Writes a results file, whose folder is made; `None`: to standard output."""
    text = json.dumps(content, indent=1)
    if path is None:
        print(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
