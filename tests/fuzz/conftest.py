"""Writes down how examples came out."""

from hift_testing.fuzzing import write_counts


def pytest_sessionfinish(session, exitstatus):
    write_counts(exitstatus)
