"""The replay of ZeRO-3's coordinator, against sequences by hand.

Each parameter is written as its elements; a whole one takes 2 bytes an element, padded 2 x (elements + 1).
"""

from types import SimpleNamespace

import pytest

from hift_ds.memory.gathering import ParameterSize, replay
from hift_ds.memory.trace import FETCH, GRADIENT, RELEASE, Event

A, B, C, D, E = "a", "b", "c", "d", "e"
NUMEL = {A: 10, B: 20, C: 30, D: 40, E: 5}
SIZES = {name: ParameterSize(numel, 2 * numel, 2 * (numel + 1)) for name, numel in NUMEL.items()}
MANY = 10**9


def limits(prefetch_bucket_size, max_live_parameters, max_reuse_distance):
    """What DeepSpeed's own object for "zero_optimization" is asked for."""
    return SimpleNamespace(
        prefetch_bucket_size=prefetch_bucket_size, max_live_parameters=max_live_parameters,
        max_reuse_distance=max_reuse_distance,
    )  # fmt: skip


NO_PREFETCH = limits(0, MANY, 0)


def fetch(*names):
    return Event(FETCH, names, 0, 0, True)


def release(*names):
    return Event(RELEASE, names, 0, 0, True)


def steps(*uses):
    """Each a parameter, or a tuple of them, fetched and released."""
    names = [use if isinstance(use, tuple) else (use,) for use in uses]
    return [event for use in names for event in (fetch(*use), release(*use))]


def run(events, limits=NO_PREFETCH, always=()):
    found = replay(events, SIZES, frozenset(always), limits)
    assert len(found.during) == len(found.after) == len(events)
    return found


def whole(*names):
    return sum(SIZES[name].nbytes for name in names)


def padded(*names):
    return sum(SIZES[name].padded_bytes for name in names)


def test_a_parameter_is_there_from_its_fetch_to_its_release():
    found = run(steps(A, B))
    assert found.during == (whole(A), 0, whole(B), 0)
    assert found.after == (whole(A), 0, whole(B), 0)
    assert found.sent == padded(A, B)


def test_a_parameter_used_twice_is_sent_twice():
    found = run(steps(A, B, A))
    assert found.after == (whole(A), 0, whole(B), 0, whole(A), 0)
    assert found.sent == padded(A, B, A)


def test_parameters_of_one_module_travel_in_one_bucket_and_are_copied_out_of_it():
    found = run(steps((A, B)))
    assert found.during[0] == whole(A, B) + padded(A, B), "while they are copied both are there"
    assert found.after == (whole(A, B), 0)
    assert found.sent == padded(A, B)


def test_other_events_change_nothing_and_see_what_is_gathered():
    gradient = Event(GRADIENT, (B,), 0, 0, False)
    events = [gradient, fetch(A), gradient, release(A), gradient]
    found = run(events)
    assert found.during == found.after == (0, whole(A), whole(A), 0, 0)
    assert found.sent == padded(A)


def test_persistent_parameters_are_neither_sent_nor_counted():
    found = run(steps(A, (A, B), A), always={A})
    assert found.after == (0, 0, whole(B), 0, 0, 0)
    assert found.during == found.after, "B is alone in its gather"
    assert found.sent == padded(B)


# Reuse: kept if used again before `max_reuse_distance` elements have been passed.


@pytest.mark.parametrize(("distance", "kept"), [(0, False), (1, False), (20, False), (21, True), (MANY, True)])
def test_a_parameter_is_kept_if_it_is_used_again_within_the_reuse_distance(distance, kept):
    found = run(steps(A, B, A), limits(0, MANY, distance))  # between the uses of A: B's 20 elements
    assert found.after[1] == (whole(A) if kept else 0)
    assert found.after[2] == whole(B) + (whole(A) if kept else 0)
    assert found.sent == padded(A, B) + (0 if kept else padded(A))
    assert found.after[-1] == 0, "after the last use nothing is kept"


def test_reuse_in_the_very_next_use_is_seen_at_any_distance():
    found = run(steps(A, A), limits(0, MANY, 1))
    assert found.after == (whole(A), whole(A), whole(A), 0)
    assert found.sent == padded(A)


def test_each_parameter_of_a_module_is_kept_or_released_by_itself():
    found = run(steps((A, B), C, A), limits(0, MANY, 31))
    assert found.after == (whole(A, B), whole(A), whole(A, C), whole(A), whole(A), 0)
    assert found.sent == padded(A, B, C)


# Prefetch: after each fetch the next parameters, until a bucket is full or too many are live.


def test_the_next_parameter_is_fetched_ahead():
    found = run(steps(A, B), limits(1, MANY, 0))
    assert found.during == (whole(A, B), whole(B), whole(B), 0)
    assert found.after == (whole(A, B), whole(B), whole(B), 0)
    assert found.sent == padded(A, B), "what was fetched ahead is not sent again"


@pytest.mark.parametrize(("bucket", "ahead"), [(0, ()), (20, (B,)), (21, (B, C)), (50, (B, C)), (51, (B, C, D))])
def test_a_prefetch_ends_with_the_parameter_that_fills_the_bucket(bucket, ahead):
    found = run(steps(A, B, C, D), limits(bucket, MANY, 0))
    in_flight = padded(*ahead) if len(ahead) > 1 else whole(*ahead)  # several: one padded buffer
    assert found.after[0] == whole(A) + in_flight


@pytest.mark.parametrize(("live", "ahead"), [(10, ()), (11, (B,)), (30, (B,)), (31, (B, C))])
def test_no_more_is_fetched_ahead_than_may_be_live(live, ahead):
    found = run(steps(A, B, C, D), limits(MANY, live, 0))
    in_flight = padded(*ahead) if len(ahead) > 1 else whole(*ahead)
    assert found.after[0] == whole(A) + in_flight


def test_prefetch_passes_over_what_is_there_and_what_is_persistent():
    found = run(steps(A, A, C, B), limits(1, MANY, MANY), always={C})
    assert found.after[0] == whole(A, B), "A is there and C stays, so B is the next"
    assert found.sent == padded(A, B)


def test_what_was_fetched_ahead_for_a_later_use_is_not_released_by_an_earlier_one():
    found = run(steps(A, B, A), limits(21, MANY, 0))
    # Fetching A takes B and (as the queue's third) A ahead, which is there: its release must keep it for that.
    assert found.after[1] == whole(A, B)
    assert found.sent == padded(A, B)
    assert found.after[-1] == 0


# Buckets: one buffer for several parameters; the first waiter copies all out, the last frees the buffer.


def test_a_prefetched_bucket_is_copied_by_the_first_waiter_and_freed_by_the_last():
    found = run(steps(A, B, C), limits(21, MANY, 0))
    ahead = padded(B, C)
    assert found.after == (
        whole(A) + ahead,  # in flight: the buffer alone
        ahead,
        whole(B, C) + ahead,  # B was waited for: both are copied out, and the buffer waits for C
        whole(C) + ahead,
        whole(C),  # C was waited for
        0,
    )
    assert found.during[4] == whole(C) + ahead, "until the wait is over the buffer is there"
    assert found.sent == padded(A, B, C)


def test_a_bucket_is_freed_at_once_when_one_module_waits_for_all_of_it():
    found = run(steps(A, (B, C)), limits(21, MANY, 0))
    assert found.after == (whole(A) + padded(B, C), padded(B, C), whole(B, C), 0)
    assert found.during[2] == whole(B, C) + padded(B, C)


def test_two_buckets_can_be_there_together():
    found = run(steps(A, B, C, E, D), limits(21, MANY, 0))
    assert found.after[0] == whole(A) + padded(B, C)
    assert found.after[2] == whole(B, C) + padded(B, C) + padded(E, D), "one half read, one in flight"
    assert found.sent == padded(A, B, C, D, E)


def test_padding_counts_in_flight_and_in_what_is_sent_but_not_once_it_is_whole():
    sizes = {A: ParameterSize(3, 6, 8), B: ParameterSize(5, 10, 16)}
    found = replay(steps((A, B)), sizes, frozenset(), NO_PREFETCH)
    assert (found.during[0], found.after[0], found.sent) == (16 + 24, 16, 24)


def test_nothing_happens_without_events():
    found = replay([], SIZES, frozenset(), NO_PREFETCH)
    assert (found.during, found.after, found.sent) == ((), (), 0)
