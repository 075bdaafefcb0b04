"""However gradients are asked for, an update is the oracle's or refused with a sentence on every rank: never lost."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hift_testing.contestants import (
    ONE_BLOCK,
    Script,
    Stack,
    TorchHiFT,
    beside_oracle,
    data,
    faults,
    loss_of,
    on,
    pair,
    plain_engine,
    train_step,
)
from hift_testing.ranks import RankError
from hift_testing.selection import slow

pytestmark = pytest.mark.multi_rank

# Plain DeepSpeed refuses these, or does something else, at least at one stage.
REFUSABLE = {
    "two_forwards_one_torch_backward", "two_backwards_of_one_graph", "two_torch_backwards_of_one_graph",
    "all_in_no_sync", "all_but_the_last_in_no_sync", "only_the_last_in_no_sync", "torch_style_in_no_sync", "coalesced",
}  # fmt: skip
# The caller closes the window, so that accumulation steps mean nothing.
OWN_WINDOW = {"coalesced", "closed_by_step"}
STAGES = (0, 1, 2, 3)


def micro_steps(engine: Any) -> range:
    return range(engine.gradient_accumulation_steps())


def torch_backward(engine: Any, loss: torch.Tensor, **kwargs: Any) -> None:
    """`loss.backward()`; DeepSpeed divides by the accumulation steps by itself, the oracle does not."""
    if isinstance(engine, TorchHiFT):
        engine.backward(loss, **kwargs)
    else:
        loss.backward(**kwargs)


def engine_backward(engine: Any, loss: torch.Tensor, **kwargs: Any) -> None:
    engine.backward(loss, **kwargs)


def torch_style(engine: Any, step: int) -> None:
    for micro in micro_steps(engine):
        torch_backward(engine, loss_of(engine(data(step, micro))))
        engine.step()


def two_forwards_one_backward(engine: Any, step: int, backward: Any = engine_backward) -> None:
    for micro in micro_steps(engine):
        backward(engine, loss_of(engine(data(step, micro))) + loss_of(engine(data(step, micro + 5))))
        engine.step()


def two_backwards_of_one_graph(engine: Any, step: int, backward: Any = engine_backward) -> None:
    for micro in micro_steps(engine):
        output = engine(data(step, micro))
        backward(engine, loss_of(output), retain_graph=True)
        backward(engine, output.float().abs().mean())
        engine.step()


def three_backwards_one_step(engine: Any, step: int, backward: Any = engine_backward) -> None:
    for micro in micro_steps(engine):
        for part in range(3):
            backward(engine, loss_of(engine(data(step, micro + 5 * part))))
        engine.step()


def backwards_in_reverse(engine: Any, step: int) -> None:
    for micro in micro_steps(engine):
        losses = [loss_of(engine(data(step, micro + 5 * part))) for part in range(2)]
        for loss in reversed(losses):
            engine.backward(loss)
        engine.step()


def abandoned_forward(engine: Any, step: int) -> None:
    """A metric is computed with gradients on, and thrown away."""
    for micro in micro_steps(engine):
        loss = loss_of(engine(data(step, micro)))
        float(loss_of(engine(data(step, micro + 5))).detach())
        engine.backward(loss)
        engine.step()


def backward_from(engine: Any, output: torch.Tensor, gradient: torch.Tensor) -> None:
    if isinstance(engine, TorchHiFT):
        gradient = gradient / engine.gas
    output.backward(gradient)


def gradient_of_the_output(engine: Any, step: int) -> None:
    """`output.backward(gradient)`, as a split model or a cached contrastive loss does it."""
    for micro in micro_steps(engine):
        output = engine(data(step, micro))
        detached = output.detach().requires_grad_()
        loss_of(detached).backward()
        backward_from(engine, output, detached.grad)
        engine.step()


def all_in_no_sync(engine: Any, step: int) -> None:
    for micro in micro_steps(engine):
        with engine.no_sync():
            engine.backward(loss_of(engine(data(step, micro))))
        engine.step()


def all_but_the_last_in_no_sync(engine: Any, step: int) -> None:
    for micro in micro_steps(engine):
        for part in range(2):
            with engine.no_sync():
                engine.backward(loss_of(engine(data(step, micro + 5 * part))))
        engine.backward(loss_of(engine(data(step, micro + 10))))
        engine.step()


def only_the_last_in_no_sync(engine: Any, step: int) -> None:
    for micro in micro_steps(engine):
        engine.backward(loss_of(engine(data(step, micro))))
        with engine.no_sync():
            engine.backward(loss_of(engine(data(step, micro + 5))))
        engine.step()


def torch_style_in_no_sync(engine: Any, step: int) -> None:
    for micro in micro_steps(engine):
        with engine.no_sync():
            torch_backward(engine, loss_of(engine(data(step, micro))))
        torch_backward(engine, loss_of(engine(data(step, micro + 5))))
        engine.step()


def close(engine: Any) -> None:
    """The end of a window of any length."""
    if isinstance(engine, TorchHiFT):
        engine.update()
    else:
        engine.step()


def coalesced(engine: Any, step: int) -> None:
    """Every backward of a step inside one block; the reduction comes at its end."""
    with engine.coalesce_grad_reduction():
        for part in range(3):
            engine.backward(loss_of(engine(data(step, part))))
    close(engine)


def boundary_by_hand(engine: Any, step: int) -> None:
    """The caller says when the window ends."""
    if isinstance(engine, TorchHiFT):
        for part in range(3):
            engine.backward(loss_of(engine(data(step, part))))
        engine.update()
        return
    for part in range(3):
        engine.set_gradient_accumulation_boundary(part == 2)
        engine.backward(loss_of(engine(data(step, part))))
        engine.step()


def closed_by_step(engine: Any, step: int) -> None:
    """`managed_gradient_accumulation: false`: backwards as many as the caller likes, a different number each step."""
    for part in range(1 + step % 3):
        engine.backward(loss_of(engine(data(step, part))))
    close(engine)


def first_micro_step_dropped_backward(engine: Any, step: int) -> None:
    """The usual window, but with a loss under no_grad between (a validation loss of the same batch)."""
    for micro in micro_steps(engine):
        loss = loss_of(engine(data(step, micro)))
        with torch.no_grad():
            loss_of(engine(data(step, micro + 5)))
        engine.backward(loss)
        engine.step()


SCRIPTS: dict[str, Script] = {
    "train_step": train_step,
    "torch_style": torch_style,
    "two_forwards_one_backward": two_forwards_one_backward,
    "two_forwards_one_torch_backward": partial(two_forwards_one_backward, backward=torch_backward),
    "two_backwards_of_one_graph": two_backwards_of_one_graph,
    "two_torch_backwards_of_one_graph": partial(two_backwards_of_one_graph, backward=torch_backward),
    "three_backwards_one_step": three_backwards_one_step,
    "three_torch_backwards_one_step": partial(three_backwards_one_step, backward=torch_backward),
    **{
        script.__name__: script
        for script in (
            backwards_in_reverse, abandoned_forward, gradient_of_the_output, all_in_no_sync,
            all_but_the_last_in_no_sync, only_the_last_in_no_sync, torch_style_in_no_sync, coalesced, boundary_by_hand,
            closed_by_step, first_micro_step_dropped_backward,
        )
    },
}  # fmt: skip


def three_ways(name: str, stage: int, dtype: str, gas: int, **keys: Any) -> dict[str, Any]:
    """One script by HiFT with a block a layer and with one block of all, and by plain DeepSpeed, beside the oracle."""
    found, script = {}, SCRIPTS[name]
    for way, hift in (("rotating", {}), ("one block", ONE_BLOCK)):
        engine, oracle = pair(Stack, stage, dtype, hift, gas, **keys)
        found[way] = beside_oracle(script, engine, oracle, 2 * len(oracle.blocks) + 1)
    module = Stack()
    engine = plain_engine(module, stage, dtype, gas, **keys)
    oracle = TorchHiFT(Stack(), [[fqn for fqn, _ in module.named_parameters()]], dtype, gas)
    found["plain"] = beside_oracle(script, engine, oracle, 3)
    return found


def wrong_windows(pool, names, stage, dtype="fp32", gas=1):
    """Faults of all scripts on all ranks, whatever becomes of single ones."""
    found = []
    for name in names:
        keys = {"managed_gradient_accumulation": False} if name == "closed_by_step" else {}
        try:
            results = on(pool, three_ways, name, stage, dtype, gas, **keys)
        except RankError as error:
            found.append(f"{name}: {str(error)[-300:]}")
            continue
        by_rank = [faults(result, dtype, name in REFUSABLE) for result in results]
        found += [f"{name}, rank {rank}: {fault}" for rank, wrong in enumerate(by_rank) for fault in wrong]
        if len({tuple(r[way]["error"] for way in ("rotating", "one block")) for r in results}) > 1:
            found.append(f"{name}: ranks met different errors")
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_window_is_the_oracles_on_two_ranks(two_ranks, name, stage):
    assert not wrong_windows(two_ranks, [name], stage)


@pytest.mark.parametrize("stage", [slow(0), slow(1), 2, slow(3)])
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
