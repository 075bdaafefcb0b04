"""Calls in an order that nobody has planned leave the weights of an oracle in plain torch; a seed draws them."""

import pytest
from hift_testing import peer_cases_sequences as cases
from hift_testing.peer_cases import on

pytestmark = pytest.mark.multi_rank

EACH = 4  # seeds of a case: every stage
FIRST = [pytest.param(first, marks=[pytest.mark.slow] if first >= 4 * EACH else []) for first in range(0, 30 * EACH, EACH)]


@pytest.fixture(params=("one_rank", "two_ranks"))
def ranks(request):
    """Both pools in turn."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("first", FIRST)
def test_any_order_of_calls_trains_as_the_oracle(ranks, tmp_path, first):
    found = on(ranks, cases.trained, str(tmp_path), range(first, first + EACH))
    assert not any(found), found
