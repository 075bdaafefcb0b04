"""What a run shows: a progress bar on a terminal, a line now and then elsewhere; tables. Rank 0 only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from hift_ds.distributed import MPI_VARIABLES

LINE_EVERY_S = 10.0
Bar = Callable[..., None]  # takes `completed` and `description`


class Display:
    """Prints on rank 0 and stays silent elsewhere."""

    def __init__(self, rank: int) -> None:
        self.active = rank == 0
        # mpirun gives its ranks a terminal, whatever its own output goes to.
        terminal = sys.stdout.isatty() and not any(name in os.environ for name in MPI_VARIABLES)
        options: dict[str, Any] = {} if terminal else {"width": 80, "force_terminal": False}
        self.console = Console(quiet=not self.active, highlight=False, emoji=False, **options)

    def print(self, *parts: Any, **options: Any) -> None:
        """Prints text or rich renderables."""
        self.console.print(*parts, **options)

    @contextmanager
    def progress(self, total: int, completed: int) -> Iterator[_Steps]:
        """A bar for the training steps on a terminal, a line now and then elsewhere."""
        with self._bar(TimeRemainingColumn(compact=True), total, completed) as bar:
            yield _Steps(self.console, bar, total, completed)

    @contextmanager
    def cells(self, total: int) -> Iterator[_Cells]:
        """A line for each cell of a comparison that is done, and a bar on a terminal."""
        with self._bar(TimeElapsedColumn(), total) as bar:
            yield _Cells(self.console, bar, total)

    @contextmanager
    def _bar(self, time_column: Any, total: int, completed: int = 0) -> Iterator[Bar | None]:
        if not (self.active and self.console.is_terminal):
            yield None
            return
        # The text gives way where the terminal is narrow, not the numbers beside it.
        text = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        columns = (BarColumn(bar_width=12), MofNCompleteColumn(), text, time_column)
        with Progress(*columns, console=self.console, expand=True) as progress:
            yield partial(progress.update, progress.add_task("", total=total, completed=completed))


class _Cells:
    def __init__(self, console: Console, bar: Bar | None, total: int) -> None:
        self.console, self.bar, self.total, self.done = console, bar, total, 0

    def start(self, name: str) -> None:
        """Shows what runs now."""
        if self.bar is not None:
            self.bar(description=name)

    def finish(self, name: str, status: str, peak_mib: float | None, step_ms: float | None) -> None:
        """Shows one finished cell."""
        self.done += 1
        figures = f"{peak_mib:,.1f} MiB" if peak_mib is not None else status
        if step_ms is not None:
            figures += f", {step_ms:,.0f} ms a step"
        self.console.print(f"{self.done}/{self.total} {name}: {figures}", markup=False)
        if self.bar is not None:
            self.bar(completed=self.done)


class _Steps:
    def __init__(self, console: Console, bar: Bar | None, total: int, completed: int) -> None:
        self.console, self.bar, self.total, self.completed = console, bar, total, completed
        self._last_line = 0.0

    def update(self, loss: float, lr: float, block: str, tokens_per_s: float) -> None:
        """Shows one finished step."""
        self.completed += 1
        text = f"loss {loss:.3f} lr {lr:.1e} {tokens_per_s:,.0f} tok/s {block}"
        if self.bar is not None:
            self.bar(completed=self.completed, description=text)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S or self.completed == self.total:
            self._last_line = time.monotonic()
            self.console.print(f"step {self.completed}/{self.total}  {text}")
