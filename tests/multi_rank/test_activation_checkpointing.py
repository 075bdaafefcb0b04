"""Activation checkpointing: the same training, a backward that stops at the active block, no silent zero updates."""

from __future__ import annotations

import pytest
from hift_testing import error_cases as cases
from hift_testing.selection import diagonal

pytestmark = pytest.mark.multi_rank


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_checkpointing_trains_the_same_and_stops_at_the_active_block(two_ranks, stage):
    plain = two_ranks.run(cases.activation_checkpointing, stage, None)
    for reentrant in (True, False):
        for rank, facts in enumerate(two_ranks.run(cases.activation_checkpointing, stage, reentrant)):
            assert facts["digest"] == plain[rank]["digest"]
            assert facts["active"] == [5, 4, 3, 2, 1, 0, 5]
            # block 0 is the embedding, blocks 1-4 are the layers: what lies below has no gradient and is not run again
            reached = [[layer + 1 >= active for layer in range(4)] for active in facts["active"]]
            assert facts["alive"] == reached
            assert facts["recomputed"] == [[int(layer) for layer in step] for step in reached]
            assert len(facts["warnings"]) == (reentrant and rank == 0)
            assert all("use_reentrant=False" in message for message in facts["warnings"])


def test_without_checkpointing_nothing_is_recomputed_or_warned_of(two_ranks):
    for facts in two_ranks.run(cases.activation_checkpointing, 1, None):
        assert facts["recomputed"] == [[0] * 4] * 7
        assert facts["alive"] == [[layer + 1 >= active for layer in range(4)] for active in facts["active"]]
        assert facts["warnings"] == []


@pytest.mark.parametrize(("stage", "always"), diagonal(range(4), (False, True)))
def test_a_models_own_reentrant_checkpoint_raises_on_every_rank(two_ranks, stage, always):
    for facts in two_ranks.run(cases.own_reentrant_checkpoint, stage, always):
        assert facts["error"].startswith("RuntimeError: block 0 (layers.0) received no gradient on any rank")
        assert "use_reentrant=False" in facts["error"]
        assert facts["changed"] == []
