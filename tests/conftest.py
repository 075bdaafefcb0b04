"""Shared by all tests: a CPU run, one thread per process, no network."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before the first `import triton`
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from importlib.metadata import version

import pytest
from hift_testing.ranks import RankPool

from hift_ds.config import surface


def pytest_collection_modifyitems(items):
    if surface.gathers_on_cpu(version("deepspeed")):
        return
    reason = "ZeRO-3 of this DeepSpeed gathers wrong weights now and then on CPU ranks"
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        at_stage_3 = params.get("stage") == 3 or "zero3" in str(params.get("run"))
        if at_stage_3 or item.get_closest_marker("gathers"):
            item.add_marker(pytest.mark.skip(reason=reason))


def _pool(world: int):
    pool = RankPool(world)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def compiled_adam():
    """DeepSpeed's Adam for the CPU, and its FusedAdam, are compiled."""
    from hift_testing.compiled import compile_operator

    for name in ("cpu_adam", "fused_adam"):
        compile_operator(name)


@pytest.fixture(scope="session")
def two_ranks():
    """Two gloo ranks, started at the first use and shared by the whole session (of one of pytest-xdist's workers)."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def one_rank():
    """One rank in a process of its own (DeepSpeed's process group would outlive a test in this one)."""
    yield from _pool(1)


@pytest.fixture
def fresh_rank():
    """One rank in a process of this test alone: what DeepSpeed keeps of other tests' engines is not in its memory."""
    yield from _pool(1)


@pytest.fixture(scope="module")
def four_ranks():
    """Four gloo ranks."""
    yield from _pool(4)
