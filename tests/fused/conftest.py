"""The kernels are compiled for four architectures on the second core while the first runs the interpreter."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 500
_COMPILING = pytest.StashKey[tuple[subprocess.Popen, Path]]()


def _waits(item: pytest.Item) -> bool:
    return "compiled" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items):
    items.sort(key=_waits)  # stable: those that wait for the compiler come last


def pytest_collection_finish(session):
    if not any(map(_waits, session.items)) or session.config.option.collectonly:
        return
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "tests")])
    folder = Path(tempfile.mkdtemp(prefix="ahead_of_time"))
    command = [sys.executable, "-m", "hift_testing.ahead_of_time"]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        session.config.stash[_COMPILING] = (subprocess.Popen(command, stdout=out, stderr=err, env=environment), folder)


def pytest_sessionfinish(session):
    process, _ = session.config.stash.get(_COMPILING, (None, None))
    if process is not None and process.poll() is None:
        process.kill()


@pytest.fixture(scope="session")
def compiled_json(request) -> str:
    """What `hift_testing.ahead_of_time` prints."""
    process, folder = request.config.stash[_COMPILING]
    assert process.wait(TIMEOUT_S) == 0, (folder / "err").read_text()[-3000:]
    return (folder / "out").read_text()
