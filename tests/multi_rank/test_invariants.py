"""What a step of HiFT changes and what it must not, on two ranks at every ZeRO stage."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from hift_testing.disturbed import branch_steps, ranks_disagree
from hift_testing.fingerprints import changed, digest_of, state_by_block, weights_by_block
from hift_testing.messages import error_of
from hift_testing.selection import diagonal, slow
from hift_testing.training import batch_of, ds_config, engine_of, run_steps, small_llama

pytestmark = pytest.mark.multi_rank

EVERYTHING = {"frozen": ["layers.1.mlp"], "always_active": ["layers.0.mlp.down_proj"]}
CYCLES = 2


def watch(
    stage: int,
    dtype: str,
    hift: dict[str, Any],
    accumulation: int = 1,
    user_frozen: str = "",
    evaluate: bool = False,
) -> tuple[list[str], list[str], int]:
    """Trains, and holds at every step that the active block has changed, and nothing else.

    Args:
        user_frozen: Regex of parameters with requires_grad=False before `initialize`.
        evaluate: Run forwards without gradient between micro steps and between steps.

    Returns:
        A fingerprint of the weights after each step, the frozen parameters, and the number of blocks.
    """
    model = small_llama()
    for name, param in model.named_parameters():
        if user_frozen and re.search(user_frozen, name):
            param.requires_grad_(False)
    engine = engine_of(ds_config(stage, dtype, hift, gradient_accumulation_steps=accumulation), model)
    named, rank, plan = dict(engine.module.named_parameters()), dist.get_rank(), engine.block_plan
    order, blocks, per_turn = engine.hift.order, len(engine.hift.blocks), hift.get("steps_per_block", 1)
    assert sorted(order) == list(range(blocks))
    digests, weights, state = [], weights_by_block(engine), state_by_block(engine)

    def gradients() -> set[str]:
        return {name for name, param in named.items() if param.grad is not None}

    for step in range(CYCLES * blocks * per_turn):
        active = order[step // per_turn % blocks]
        assert engine.hift.active_block == active
        trains = {*engine.hift.blocks[active].fqns, *plan.always_active}
        for micro in range(accumulation):
            assert {name for name, param in named.items() if param.requires_grad} == trains
            loss = engine(**batch_of(step, micro, rank)).loss
            if evaluate:
                evaluation(engine)
            engine.backward(loss)
            assert gradients() <= trains
            assert engine.hift.active_block == active, f"rotated in micro step {micro}"
            engine.step()
            if micro + 1 < accumulation:
                assert changed(weights, weights_by_block(engine)) == [], f"changed in micro step {micro}"
        if evaluate:
            evaluation(engine)
        assert not gradients()
        after, state_after = weights_by_block(engine), state_by_block(engine)
        moved = [str(active), *(["always"] if plan.always_active else [])]
        # frozen parameters are listed by name: none is among what has changed
        assert changed(weights, after) == changed(state, state_after) == moved
        assert engine.hift.cycle == (step + 1) // (blocks * per_turn)
        weights, state = after, state_after
        digests.append(digest_of(weights))
    assert {state.step for state in engine.optimizer.states} == {CYCLES * per_turn}
    return digests, list(plan.frozen), blocks


def evaluation(engine: Any) -> None:
    """A forward in eval mode without gradient, as a validation loop does it."""
    engine.eval()
    with torch.no_grad():
        engine(**batch_of(99, 0, dist.get_rank()))
    engine.train()


def alike(results: list[Any]) -> Any:
    """What all ranks have found."""
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.parametrize(("stage", "dtype"), diagonal(range(4), ("fp32", "bf16")))
def test_only_the_active_block_and_its_state_change_at_a_step(two_ranks, stage, dtype):
    alike(two_ranks.run(watch, stage, dtype, {}))


@pytest.mark.parametrize("stage", (slow(0), 1, slow(2), 3))
def test_frozen_never_move_and_always_active_move_at_every_step(two_ranks, stage):
    hift = {**EVERYTHING, "order": "random"}
    _, frozen, _ = alike(two_ranks.run(watch, stage, "bf16", hift, user_frozen="layers.2.self_attn.q_proj"))
    assert len(frozen) == 4
    assert "model.layers.2.self_attn.q_proj.weight" in frozen


@pytest.mark.parametrize(("stage", "dtype"), [slow(0, "fp32"), (1, "bf16"), slow(2, "bf16"), slow(3, "fp32")])
def test_accumulation_never_rotates_inside_a_window(two_ranks, stage, dtype):
    hift = {"order": "top2down", "steps_per_block": 2, "layers_per_block": 4}
    _, _, blocks = alike(two_ranks.run(watch, stage, dtype, hift, accumulation=3))
    assert blocks == 2


# At stage 3 `make test` has the peers' forwards and generation under inference mode (tests/peers/test_zero3.py).
@pytest.mark.parametrize("stage", (slow(0), 1, slow(2), slow(3)))
def test_forwards_without_gradient_change_nothing(two_ranks, stage):
    plain = alike(two_ranks.run(watch, stage, "fp32", {"layers_per_block": 2}, accumulation=2))
    assert alike(two_ranks.run(watch, stage, "fp32", {"layers_per_block": 2}, accumulation=2, evaluate=True)) == plain


@pytest.mark.parametrize("stage", range(4))
def test_ranks_that_disagree_on_the_active_block_raise_everywhere(two_ranks, stage):
    two_ranks.run(ranks_disagree, stage)


def compiled_before() -> None:
    """`torch.compile(model)` before `initialize`: as many compilations as there are blocks, above dynamo's limit."""
    import torch._dynamo as dynamo

    graphs: list[Any] = []
    dynamo.reset()
    before, dynamo.config.recompile_limit = dynamo.config.recompile_limit, 2
    try:
        model = torch.compile(small_llama(layers=3), backend=lambda graph, _: graphs.append(graph) or graph.forward)
        run_steps(engine_of(ds_config(0, "fp32", {}), model), 10)
    finally:
        dynamo.config.recompile_limit = before
    assert len(graphs) >= 5, len(graphs)


@pytest.mark.slow
def test_a_model_compiled_before_is_compiled_for_each_block(two_ranks):
    two_ranks.run(compiled_before)


def other_configs_on_one_rank() -> None:
    """Of blocks, of a rate, of micro steps (which would wait for ever), of clipping, of the stage."""
    rank = dist.get_rank()
    configs = [ds_config(1, "fp32", {"order": "random", "seed": rank}), *(ds_config(1, "fp32", {}) for _ in range(3))]
    configs[1]["optimizer"]["params"]["lr"] = 1e-3 * (1 + rank)
    configs[2]["gradient_accumulation_steps"] = 1 + rank
    configs[3]["gradient_clipping"] = 0.5 * rank
    for config in (*configs, ds_config(rank, "fp32", {})):
        error = error_of(lambda config=config: engine_of(config))
        assert error.startswith("RuntimeError: config or model: ranks 0 and 1 differ"), error


def a_function_in_a_group() -> None:
    """It prints its address, which each process has of its own: no difference that counts."""
    model = small_llama()
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "schedule": lambda step: 1.0}], lr=1e-3)
    run_steps(engine_of(ds_config(2, "fp32", {}), model, optimizer=optimizer), 1)


def test_what_prints_otherwise_in_each_process_is_no_difference_between_ranks(two_ranks):
    two_ranks.run(a_function_in_a_group)


def test_ranks_with_different_configs_are_refused_everywhere(two_ranks):
    two_ranks.run(other_configs_on_one_rank)


@pytest.mark.parametrize("stage", range(4))
def test_a_block_without_any_gradient_raises_everywhere_and_is_named(two_ranks, stage):
    for result in two_ranks.run(branch_steps, stage, branches=(2, 2), steps=2):
        assert result["error"].startswith("RuntimeError: block 1 (^layers.1) received no gradient on any rank")
        assert result["changed"] == ["0"]


@pytest.mark.parametrize("stage", range(3))  # ZeRO-3 itself hangs where ranks run different modules
def test_a_block_that_one_rank_does_not_reach_is_trained_all_the_same(two_ranks, stage):
    results = two_ranks.run(branch_steps, stage, branches=(1, 2), steps=3)
    for result in results:
        assert result["error"] == ""
        assert result["changed"] == ["0", "1", "2"]
        assert result["digest"] == results[0]["digest"]


def window() -> None:
    """`engine.hift` at the start and after one cycle and a step."""
    engine = engine_of(ds_config(2, "bf16", {"order": "top2down", "layers_per_block": 4}))
    view, numel = engine.hift, {name: param.numel() for name, param in engine.module.named_parameters()}
    assert (view.active_block, view.cycle, view.order) == (1, 0, [1, 0])
    run_steps(engine, len(view.blocks) + 1)
    assert (view.active_block, view.cycle) == (0, 1)
    assert [block.numel for block in view.blocks] == [sum(numel[fqn] for fqn in block.fqns) for block in view.blocks]
    whole = sum(block.numel for block in view.blocks)
    assert whole == sum(numel.values())
    # bf16, two ranks: 12 bytes of master and moments for half of each parameter; padding adds a little
    assert 1.0 <= view.host_bytes / (12 * whole / 2) < 1.05
    lines, first = view.summary().splitlines(), view.blocks[0]
    assert max(map(len, lines)) <= 80
    assert any("> 0" in line and first.name[:20] in line and f"{first.numel:,}" in line for line in lines)
    assert engine.get_lr() == [1e-3]


def test_the_window_shows_blocks_order_position_and_a_table(two_ranks):
    two_ranks.run(window)
