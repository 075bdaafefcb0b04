"""Calls in an order that nobody has planned leave the weights of an oracle in plain torch; a seed draws them."""

import pytest
from hift_testing import peer_cases_sequences as cases

pytestmark = pytest.mark.multi_rank

EACH = 4  # seeds of a case: every stage
QUICK = 4  # the rest is slow


@pytest.fixture(params=("one_rank", "two_ranks"))
def ranks(request):
    """Both pools in turn."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    "first", [pytest.param(EACH * (i + 1), marks=() if i < QUICK else pytest.mark.slow) for i in range(30)]
)
def test_any_order_of_calls_trains_as_the_oracle(ranks, tmp_path, first):
    found = ranks.run(cases.trained, str(tmp_path), range(first, first + EACH), timeout_s=300)
    assert not any(found), found
