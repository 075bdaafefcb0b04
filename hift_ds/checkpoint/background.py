"""Files that are written while training goes on: each before what is in it changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from hift_ds.checkpoint.tensor_files import FileFacts

Job = Callable[[], Mapping[str, FileFacts]]


class BackgroundSave:
    """Runs jobs in a thread, in their order; one that is needed first runs in the thread that needs it.

    Args:
        jobs: By name; each returns the facts of the files that it has written.
        conclude: Is called in the thread after all jobs, with what they have returned and the first error.
    """

    def __init__(
        self, jobs: Mapping[str, Job], conclude: Callable[[Mapping[str, FileFacts], Exception | None], None]
    ) -> None:
        self._waiting, self._running = dict(jobs), set[str]()
        self._conclude, self._changed = conclude, threading.Condition()
        self._files: dict[str, FileFacts] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="hift_ds checkpoint")
        self._thread.start()

    def ensure(self, name: str) -> None:
        """Returns when a job has ended; one that there is not has."""
        with self._changed:
            job = self._waiting.pop(name, None)
            if job is None:
                self._changed.wait_for(lambda: name not in self._running)
                return
            self._running.add(name)
        try:
            found = job()
        except Exception as error:
            self._error = self._error or error
        else:
            self._files.update(found)
        with self._changed:
            self._running.discard(name)
            self._changed.notify_all()

    def flush(self) -> None:
        """Returns when all jobs have ended."""
        while name := next(iter(self._waiting), None):
            self.ensure(name)
        with self._changed:
            self._changed.wait_for(lambda: not self._running)

    @property
    def goes_on(self) -> bool:
        """Whether it is not concluded yet."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Until all is concluded.

        Raises:
            Exception: The first that a job or the conclusion has raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        self.flush()
        try:
            self._conclude(self._files, self._error)
        except Exception as error:
            self._error = self._error or error
