"""However gradients are asked for, an update is the oracle's or refused with a sentence on every rank: never lost."""

from __future__ import annotations

import pytest
from hift_testing.peer_cases import faults, on
from hift_testing.peer_cases_windows import SCRIPTS, windows
from hift_testing.ranks import RankError

pytestmark = pytest.mark.multi_rank

# Plain DeepSpeed refuses these, or does something else, at least at one stage.
REFUSABLE = {
    "two_forwards_one_torch_backward", "two_backwards_of_one_graph", "two_torch_backwards_of_one_graph",
    "all_in_no_sync", "all_but_the_last_in_no_sync", "only_the_last_in_no_sync", "torch_style_in_no_sync", "coalesced",
}  # fmt: skip
# The caller closes the window, so that accumulation steps mean nothing.
OWN_WINDOW = {"coalesced", "closed_by_step"}
STAGES = (0, 1, 2, 3)


def wrong_windows(pool, names, stage, dtype="fp32", gas=1):
    """Faults of all scripts on all ranks, whatever becomes of single ones."""
    found = []
    for name in names:
        keys = {"managed_gradient_accumulation": False} if name == "closed_by_step" else {}
        try:
            results = on(pool, windows, [name], stage, dtype, gas, **keys)
        except RankError as error:
            found.append(f"{name}: {str(error)[-300:]}")
            continue
        by_rank = [faults(result[name], dtype, name in REFUSABLE) for result in results]
        found += [f"{name}, rank {rank}: {fault}" for rank, wrong in enumerate(by_rank) for fault in wrong]
        if len({tuple(r[name][way]["error"] for way in ("rotating", "one block")) for r in results}) > 1:
            found.append(f"{name}: ranks met different errors")
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_window_is_the_oracles_on_two_ranks(two_ranks, name, stage):
    assert not wrong_windows(two_ranks, [name], stage)


@pytest.mark.parametrize("stage", STAGES)
def test_windows_are_the_oracles_on_one_rank(one_rank, stage):
    assert not wrong_windows(one_rank, SCRIPTS, stage)


@pytest.mark.slow
@pytest.mark.parametrize("gas", (2, 3))
@pytest.mark.parametrize("stage", STAGES)
def test_windows_with_accumulation_are_the_oracles_on_two_ranks(two_ranks, stage, gas):
    assert not wrong_windows(two_ranks, [name for name in SCRIPTS if name not in OWN_WINDOW], stage, gas=gas)


@pytest.mark.slow
@pytest.mark.parametrize("gas", (2, 3))
@pytest.mark.parametrize("stage", STAGES)
def test_windows_with_accumulation_are_the_oracles_on_one_rank(one_rank, stage, gas):
    assert not wrong_windows(one_rank, [name for name in SCRIPTS if name not in OWN_WINDOW], stage, gas=gas)


@pytest.mark.slow
@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
def test_windows_in_bf16_are_the_oracles_on_two_ranks(two_ranks, stage, gas):
    names = [name for name in SCRIPTS if gas == 1 or name not in OWN_WINDOW]
    assert not wrong_windows(two_ranks, names, stage, "bf16", gas)
