"""A third of the peers' cases in `make test`, spread over stages and ranks; all of them in `make slow`."""

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    peers = [item for item in items if Path(item.fspath).parent == Path(__file__).parent]
    for index, item in enumerate(peers):
        if index % 3:
            item.add_marker(pytest.mark.slow)
