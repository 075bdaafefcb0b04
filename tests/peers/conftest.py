"""Of the peers' cases `make test` takes few: each test meets every value of each of its parameters (stages, numbers of
ranks, ...) at least once, and the tests of a file share out stages and ranks. `make slow` takes the others."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest


@pytest.fixture(params=("one_rank", "two_ranks"))
def ranks(request):
    """Both pools in turn."""
    return request.getfixturevalue(request.param)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    by_test = defaultdict(list)
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent and not item.get_closest_marker("slow"):
            by_test[item.nodeid.partition("[")[0]].append(item)
    taken = defaultdict(Counter)  # by file, so that a file's cases are the same alone and among all
    for cases in by_test.values():
        for case in _left_out(cases, taken[cases[0].fspath]):
            case.add_marker(pytest.mark.slow)


def _values(case):
    params = case.callspec.params if hasattr(case, "callspec") else {}
    return {(name, str(value)) for name, value in params.items()}


def _pool(case):
    """Stage and ranks of a case."""
    found = dict(_values(case))
    return found.get("stage"), found.get("ranks")


def _left_out(cases, taken):
    """Cases without which all values are met; of two that meet as many new ones, the one whose stage and ranks the
    tests before have `taken` less often is kept."""
    missing, left = set().union(*map(_values, cases)), list(cases)
    while missing or len(left) == len(cases):
        best = max(left, key=lambda case: (len(_values(case) & missing), -taken[_pool(case)]))
        missing -= _values(best)
        taken[_pool(best)] += 1
        left.remove(best)
    return left
