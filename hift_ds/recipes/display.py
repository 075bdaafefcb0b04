"""What a run shows: a progress bar on a terminal, a line now and then elsewhere; tables. Rank 0 only."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from hift_ds.distributed import MPI_VARIABLES

LINE_EVERY_S = 10.0


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

    def progress(self, total: int, completed: int) -> _Steps:
        """A bar for the training steps, to be used in a `with`."""
        return _Steps(self.console, self.active, total, completed)

    def cells(self, total: int) -> _Cells:
        """A bar for the cells of a comparison, to be used in a `with`."""
        return _Cells(self.console, total)


class _Bar:
    """A progress bar on a terminal, nothing elsewhere."""

    bar: Progress | None = None

    def _begin(self, console: Console, time_column: Any, total: int, completed: int = 0) -> None:
        # The text gives way where the terminal is narrow, not the numbers beside it.
        text = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        columns = (BarColumn(bar_width=12), MofNCompleteColumn(), text, time_column)
        self.bar = Progress(*columns, console=console, expand=True)
        self.task = self.bar.add_task("", total=total, completed=completed)

    def __enter__(self) -> Any:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


class _Cells(_Bar):
    """The cells of a comparison: a bar on a terminal, a line for each that is done."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0
        if console.is_terminal:
            self._begin(console, TimeElapsedColumn(), total)

    def start(self, name: str) -> None:
        """Shows what runs now."""
        if self.bar is not None:
            self.bar.update(self.task, description=name)

    def finish(self, name: str, status: str, peak_mib: float | None, step_ms: float | None) -> None:
        """Shows one finished cell."""
        self.done += 1
        figures = f"{peak_mib:,.1f} MiB" if peak_mib is not None else status
        if step_ms is not None:
            figures += f", {step_ms:,.0f} ms a step"
        self.console.print(f"{self.done}/{self.total} {name}: {figures}", markup=False)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)


class _Steps(_Bar):
    def __init__(self, console: Console, active: bool, total: int, completed: int) -> None:
        self.console, self.total, self.completed = console, total, completed
        self._last_line = 0.0
        if active and console.is_terminal:
            self._begin(console, TimeRemainingColumn(compact=True), total, completed)

    def update(self, loss: float, lr: float, block: str, tokens_per_s: float) -> None:
        """Shows one finished step."""
        self.completed += 1
        text = f"loss {loss:.3f} lr {lr:.1e} {tokens_per_s:,.0f} tok/s {block}"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.completed, description=text)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S or self.completed == self.total:
            self._last_line = time.monotonic()
            self.console.print(f"step {self.completed}/{self.total}  {text}")
