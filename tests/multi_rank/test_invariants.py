"""What a step of HiFT changes and what it must not, on two ranks at every ZeRO stage."""

from __future__ import annotations

import pytest
from hift_testing import invariant_cases as cases
from hift_testing.selection import diagonal, slow

pytestmark = pytest.mark.multi_rank

EVERYTHING = {"frozen": ["layers.1.mlp"], "always_active": ["layers.0.mlp.down_proj"]}


def assert_rotation_is_kept(results: list[dict], always: bool = False, steps_per_block: int = 1) -> None:
    """Every property of a step, from what `cases.watch` noted on each rank."""
    for result in results:
        order, blocks = result["order"], result["blocks"]
        every_step = ["always"] if always else []
        for step, facts in enumerate(result["record"]):
            turn = step // steps_per_block
            active = str(order[turn % blocks])
            assert facts["faults"] == []
            assert str(facts["active"]) == active
            assert facts["weights"] == [active, *every_step]
            assert facts["state"] == [active, *every_step]
            assert facts["cycle"] == (step + 1) // (blocks * steps_per_block)
        assert [facts["digest"] for facts in result["record"]] == [facts["digest"] for facts in results[0]["record"]]
        per_block = len(result["record"]) // blocks
        assert result["record"][-1]["steps"] == [per_block] * blocks
        per_cycle = blocks * steps_per_block
        for start in range(0, len(result["record"]), per_cycle):
            visited = [facts["active"] for facts in result["record"][start : start + per_cycle : steps_per_block]]
            assert sorted(visited) == list(range(blocks))


@pytest.mark.parametrize(("stage", "dtype"), diagonal(range(4), ("fp32", "bf16")))
def test_only_the_active_block_and_its_state_change_at_a_step(two_ranks, stage, dtype):
    assert_rotation_is_kept(two_ranks.run(cases.watch, stage, dtype, {}))


@pytest.mark.parametrize("stage", (slow(0), 1, slow(2), 3))
def test_frozen_never_move_and_always_active_move_at_every_step(two_ranks, stage):
    results = two_ranks.run(
        cases.watch, stage, "bf16", {**EVERYTHING, "order": "random"}, user_frozen="layers.2.self_attn.q_proj"
    )
    # `weights` lists frozen parameters by name: that none is in it is part of the rotation's property
    assert_rotation_is_kept(results, always=True)
    frozen = [name for name in results[0]["names"] if "." in name]
    assert len(frozen) == 4
    assert "model.layers.2.self_attn.q_proj.weight" in frozen


@pytest.mark.parametrize(("stage", "dtype"), [slow(0, "fp32"), (1, "bf16"), slow(2, "bf16"), (3, "fp32")])
def test_accumulation_never_rotates_inside_a_window(two_ranks, stage, dtype):
    hift = {"order": "top2down", "steps_per_block": 2, "layers_per_block": 4}
    results = two_ranks.run(cases.watch, stage, dtype, hift, accumulation=3)
    assert results[0]["blocks"] == 2
    assert_rotation_is_kept(results, steps_per_block=2)


# At stage 3 `make test` has the peers' forwards and generation under inference mode (tests/peers/test_zero3.py).
@pytest.mark.parametrize("stage", (slow(0), 1, slow(2), slow(3)))
def test_forwards_without_gradient_change_nothing(two_ranks, stage):
    plain = two_ranks.run(cases.watch, stage, "fp32", {"layers_per_block": 2}, accumulation=2)
    evaluated = two_ranks.run(cases.watch, stage, "fp32", {"layers_per_block": 2}, accumulation=2, evaluate=True)
    assert_rotation_is_kept(evaluated)
    assert [facts["digest"] for facts in evaluated[0]["record"]] == [facts["digest"] for facts in plain[0]["record"]]


@pytest.mark.parametrize("stage", range(4))
def test_ranks_that_disagree_on_the_active_block_raise_everywhere(two_ranks, stage):
    for rank, result in enumerate(two_ranks.run(cases.ranks_disagree, stage)):
        assert result["error"].startswith("RuntimeError: ranks disagree on the active block"), rank
        assert result["changed"] == []


def test_ranks_with_different_configs_are_refused_everywhere(two_ranks):
    for error in two_ranks.run(cases.other_seed_on_one_rank):
        assert error.startswith("RuntimeError: hift section or model: ranks 0 and 1 differ")


@pytest.mark.parametrize("stage", range(4))
def test_a_block_without_any_gradient_raises_everywhere_and_is_named(two_ranks, stage):
    for result in two_ranks.run(cases.branch_steps, stage, branches=(2, 2), steps=2):
        assert result["error"].startswith("RuntimeError: block 1 (^layers.1) received no gradient on any rank")
        assert result["changed"] == ["0"]


@pytest.mark.parametrize("stage", range(3))  # ZeRO-3 itself hangs where ranks run different modules
def test_a_block_that_one_rank_does_not_reach_is_trained_all_the_same(two_ranks, stage):
    results = two_ranks.run(cases.branch_steps, stage, branches=(1, 2), steps=3)
    for result in results:
        assert result["error"] == ""
        assert result["changed"] == ["0", "1", "2"]
        assert result["digest"] == results[0]["digest"]


def test_the_window_shows_blocks_order_position_and_a_table(two_ranks):
    for view in two_ranks.run(cases.window, {"order": "top2down", "layers_per_block": 4}):
        names, fqns, numels = zip(*view["blocks"], strict=True)
        assert view["start"] == {"active": 1, "cycle": 0, "order": [1, 0]}
        assert (view["active"], view["cycle"]) == (0, 1)
        assert numels == tuple(sum(view["numel"][fqn] for fqn in block) for block in fqns)
        assert sum(numels) == sum(view["numel"].values())
        # bf16, two ranks: 12 bytes of master and moments for half of each parameter; padding adds a little
        assert 1.0 <= view["host_bytes"] / (12 * sum(numels) / 2) < 1.05
        lines = view["summary"].splitlines()
        assert max(map(len, lines)) <= 80
        assert any("> 0" in line and names[0][:20] in line and f"{numels[0]:,}" in line for line in lines)
        assert view["lr"] == [1e-3]
