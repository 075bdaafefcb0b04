"""Ranks that stay up: each start of a rank costs seconds, so a module's cases share one pool.

A case is a function of a test file, which asserts on its rank: ranks import the file by its module's name (pytest's
importlib mode names it by its path from the repository, which is on sys.path).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
import types
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from _pytest.assertion import install_importhook
from _pytest.config import get_config

CASE_TIMEOUT_S = 120
AFTER_A_FAILURE_S = 10  # for the others, which may wait in a collective for the rank that has failed
# What every rank imports, 8 s of a CPU: once, in the process that ranks are forked from.
PRELOADED = ["deepspeed", "pytest", "transformers.models.llama.modeling_llama", "transformers.trainer", "accelerate"]
ON_CUDA = os.environ.get("HIFT_TEST_DEVICE") == "cuda"  # which no process may have begun to use before it is forked


class RankError(RuntimeError):
    """A case failed on at least one rank; the message holds tracebacks, the first failure's first."""


class RankPool:
    """`world` processes joined by gloo. `run` calls one function on all of them."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._members: list[tuple[Any, Any]] = []

    def run(self, case: Callable[..., Any], *args: Any, timeout_s: float = CASE_TIMEOUT_S, **kwargs: Any) -> list[Any]:
        """Calls `case(*args, **kwargs)` on every rank; returns the results by rank.

        Raises:
            RankError: The case raised, or did not end in time; the pool is then replaced at the next call.
        """
        __tracebackhide__ = True  # what has failed is in the message
        if not self._members:
            self._start()
        for _, pipe in self._members:
            pipe.send((case, args, kwargs))
        results: dict[int, Any] = {}
        errors: list[str] = []
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._members)}
        while waiting:
            patience_s = AFTER_A_FAILURE_S if errors else timeout_s
            ready = connection.wait(waiting, patience_s)
            if not ready:
                for rank in waiting.values():
                    alive = self._members[rank][0].is_alive()
                    errors.append(f"rank {rank}: no answer within {patience_s} s (alive: {alive})")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, results[rank] = pipe.recv()
                except EOFError:
                    ok, results[rank] = False, "the process ended"
                if not ok:
                    errors.append(f"rank {rank}:\n{results[rank]}")
        if errors:
            self.close()
            raise RankError("\n".join(errors))
        return [results[rank] for rank in range(self.world)]

    def close(self) -> None:
        """Ends the processes of this pool."""
        for process, pipe in self._members:
            pipe.close()
            process.kill()
            process.join(10)
        self._members = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn" if ON_CUDA else "forkserver")
        if not ON_CUDA:
            context.set_forkserver_preload(PRELOADED)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            self._members.append((process, mine))


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cuda" if ON_CUDA else "cpu",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    import hift_ds
    from hift_ds.engine import LIVING

    hift_ds.init_distributed()
    # The files' names begin with `tests`, a folder: a package of that name in the environment would hide it.
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests"].__path__ = [str(Path(__file__).parents[1])]
    install_importhook(get_config())  # an assertion of a test file that fails here shows its values, as pytest's do
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        try:
            case, args, kwargs = pickle.loads(call)  # which imports the test's file
            LIVING.clear()  # of engines that an earlier case has not ended
            pipe.send((True, case(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        # DeepSpeed's engines are never freed; each collection would walk through all that earlier cases have left.
        gc.collect()
        gc.freeze()
