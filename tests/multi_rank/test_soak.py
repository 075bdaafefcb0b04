"""The short form of `make soak`."""

from __future__ import annotations

from hift_testing.ranks import RankPool
from hift_testing.soak import soak


def test_a_run_that_is_saved_killed_resumed_and_resharded_ends_as_one_that_is_not(tmp_path):
    pools = {world: RankPool(world) for world in (1, 2)}
    found = soak(70, 3, tmp_path, pools, mean=12)
    for pool in pools.values():
        pool.close()
    assert found.differ == [] and found.growth_mib < 8
    assert found.counts["eras"] >= 3 and found.counts["kills"] >= 1 and found.counts["saves"] > 5, found.counts
