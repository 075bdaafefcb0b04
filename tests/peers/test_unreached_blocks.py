"""Blocks that a batch does not reach: skipped where the user says so, refused by name where not, never a hang."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from hift_testing.contestants import (
    Layer,
    Stack,
    TorchHiFT,
    adamw,
    assert_beside_oracle,
    assert_near,
    blocks_of,
    data,
    hift_engine,
    loss_of,
    moved,
    on,
    pair,
    run,
    unmoved,
)
from hift_testing.disturbed import TwoWays
from hift_testing.messages import error_of, is_clear, messages
from hift_testing.training import whole_weights
from torch import nn

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)



class LayerDrop(Stack):
    """The step says which layers are left out, the same on all ranks."""

    def __init__(self) -> None:
        super().__init__(layers=3)

    def forward(self, x: torch.Tensor, kept: tuple[int, ...]) -> torch.Tensor:
        x = x.to(self.head.weight.dtype)
        for index in kept:
            x = self.layers[index](x)
        return self.head(x)


class Seeing(nn.Module):
    """An image tower and its projector before a language model; batches of text never reach them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision_tower = nn.ModuleDict({"layers": nn.ModuleList(Layer(6) for _ in range(2))})
        self.multi_modal_projector = nn.Linear(6, 6)
        self.language_model = nn.ModuleDict({"layers": nn.ModuleList(Layer(6) for _ in range(2))})
        self.lm_head = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        x = x.to(self.lm_head.weight.dtype)
        if image is not None:
            image = image.to(x.dtype)
            for layer in self.vision_tower["layers"]:
                image = layer(image)
            x = x + self.multi_modal_projector(image)
        for layer in self.language_model["layers"]:
            x = layer(x)
        return self.lm_head(x)


class Routed(nn.Module):
    """Each layer sends a batch to one of its experts; expert 2 is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(Layer(6) for _ in range(3))}) for _ in "ab")
        self.head = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        x = x.to(self.head.weight.dtype)
        for layer in self.layers:
            x = layer["experts"][expert](x)
        return self.head(x)


BY_EXPERT = [[rf"^layers\.{layer}\.experts\.{expert}\."] for layer in range(2) for expert in range(3)] + [["^head"]]


def dropping(step: int, micro: int) -> dict[str, Any]:
    return {"kept": tuple(index for index in range(3) if (step + index) % 3 != 2 or step > 10)}


def text_only(step: int, micro: int) -> dict[str, Any]:
    return {"image": None}


def mixed(step: int, micro: int) -> dict[str, Any]:
    """Images at every third step, on all ranks."""
    return {"image": data(step, micro + 5) if step % 3 == 0 else None}


def mixed_by_rank(step: int, micro: int) -> dict[str, Any]:
    """Only the last rank has images, at some steps."""
    here = dist.get_rank() == dist.get_world_size() - 1
    return {"image": data(step, micro + 5) if here and step % 3 == 0 else None}


def routed(step: int, micro: int) -> dict[str, Any]:
    return {"expert": step // 2 % 2}


# name -> (model, section, what a batch reaches)
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any], Callable[[int, int], dict[str, Any]]]] = {
    "layer drop": (LayerDrop, {}, dropping),
    "text only": (Seeing, {}, text_only),
    "mixed": (Seeing, {}, mixed),
    "mixed by rank": (Seeing, {}, mixed_by_rank),
    "experts": (Routed, {"blocks": BY_EXPERT}, routed),
}


def script_of(name: str) -> Callable[[Any, int], None]:
    inputs = MODELS[name][2]

    def script(contestant: Any, step: int) -> None:
        for micro in range(contestant.gradient_accumulation_steps()):
            contestant.backward(loss_of(contestant(data(step, micro), **inputs(step, micro))))
            contestant.step()

    return script


def skipped_turns(name: str, stage: int, dtype: str = "fp32", gas: int = 1) -> None:
    """`no_gradient: skip` beside the oracle that passes over a block which no rank reaches."""
    model, hift, _ = MODELS[name]
    engine = hift_engine(model(), stage, dtype, {"no_gradient": "skip", **hift}, gas)
    oracle = TorchHiFT(model(), blocks_of(engine), dtype, gas, skip=True)
    script = script_of(name)
    cycles = 3
    steps = cycles * len(oracle.blocks)
    with messages() as read:
        run(script, steps, engine)
    run(script, steps, oracle)
    blocks, order, summary = engine.hift.blocks, engine.hift.order, engine.hift.summary()
    missed = {blocks[order[turn]].name: oracle.skipped.count(turn) for turn in oracle.skipped}
    assert missed, "the case must miss a block"
    assert all(name in summary and str(count) in summary for name, count in missed.items()), summary
    assert_near(engine, oracle, dtype)
    assert (engine.global_steps, engine.hift.active_block) == (steps, order[steps % len(blocks)])
    assert engine.hift.cycle == steps // len(blocks)
    unreached = [fqn for block in blocks for fqn in block.fqns if missed.get(block.name) == cycles]
    assert set(unreached) <= set(unmoved(whole_weights(engine), oracle.start))
    warnings = [text for text in read if "gradient" in text and any(name in text for name in missed)]
    assert len(warnings) <= cycles, warnings
    assert warnings or dist.get_rank() > 0, "rank 0 is told"


@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixed by rank"])
def test_a_turn_without_gradients_passes_and_is_reported(ranks, name, stage, gas):
    on(ranks, skipped_turns, name, stage, gas=gas)


@pytest.mark.parametrize("stage", (0, 1, 2))
def test_a_turn_passes_only_if_no_rank_has_gradients(two_ranks, stage):
    on(two_ranks, skipped_turns, "mixed by rank", stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixed by rank"])
def test_a_turn_without_gradients_passes_in_bf16(ranks, name, stage):
    on(ranks, skipped_turns, name, stage, "bf16")


def refused_turn(name: str, stage: int) -> str:
    """The default: the step whose block is not reached raises, names it, and changes nothing."""
    model, hift, _ = MODELS[name]
    engine = hift_engine(model(), stage, "fp32", hift)
    script, error = script_of(name), ""
    for step in range(2 * len(engine.hift.blocks)):
        before, active = whole_weights(engine), engine.hift.blocks[engine.hift.active_block].name
        error = error_of(lambda s=step: script(engine, s))
        if error:
            break
    assert error.startswith("RuntimeError") and is_clear(error), error
    assert active in error and "no_gradient" in error, error
    assert moved(whole_weights(engine), before) == []
    return error


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ("layer drop", "text only", "experts"))
def test_by_default_a_block_without_gradients_is_an_error_that_names_it(ranks, name, stage):
    assert len(set(on(ranks, refused_turn, name, stage))) == 1


def windows_after_a_refused_turn(stage: int, gas: int, clear: bool, at_micro: str) -> None:
    """A window whose block is not reached raises, is caught, and comes again with a batch that reaches it.

    Args:
        clear: Call `zero_grad` after the error.
        at_micro: Which micro steps of the window miss the block: `all` (then it raises), or `first` (then it trains).
    """
    engine, oracle = pair(LayerDrop, stage, "fp32", {}, gas)
    raised = []
    everything = (0, 1, 2)

    def window(contestant: Any, step: int, kept: Callable[[int], tuple[int, ...]]) -> None:
        for micro in range(gas):
            contestant.backward(loss_of(contestant(data(step, micro), kept=kept(micro))))
            contestant.step()

    for step in range(2 * len(oracle.blocks)):
        layer = engine.hift.active_block
        others = tuple(index for index in everything if index != layer)
        if at_micro == "all" and layer < 3:
            raised.append(error_of(lambda s=step, o=others: window(engine, s, lambda micro: o)))
            if clear:
                engine.zero_grad()
            window(engine, step, lambda micro: everything)
            window(oracle, step, lambda micro: everything)
        else:
            kept = lambda micro, o=others: o if micro == 0 and gas > 1 else everything  # noqa: E731
            window(engine, step, kept)
            window(oracle, step, kept)
    assert all(raised) and len(raised) == (6 if at_micro == "all" else 0), raised
    assert engine.global_steps == 8
    assert_near(engine, oracle)


@pytest.mark.parametrize("clear", (False, True), ids=("go on", "zero_grad first"))
@pytest.mark.parametrize("gas", (1, 2, 3))
@pytest.mark.parametrize("stage", STAGES)
def test_windows_after_a_refused_turn_are_whole(ranks, stage, gas, clear):
    on(ranks, windows_after_a_refused_turn, stage, gas, clear, "all")


@pytest.mark.parametrize("stage", STAGES)
def test_a_window_of_which_one_micro_step_reaches_the_block_trains(ranks, stage):
    on(ranks, windows_after_a_refused_turn, stage, 2, False, "first")


class WithAlways(TorchHiFT):
    """Parameters that are in no block train with each, with a state of their own."""

    def __init__(self, module: nn.Module, blocks: list[list[str]], gas: int) -> None:
        super().__init__(module, blocks, "fp32", gas)
        rest = [name for name in self.named if not any(name in block for block in blocks)]
        if rest:
            always = adamw([self.masters[name] for name in rest])
            self.blocks = [[*block, *rest] for block in self.blocks]
            both = [lambda rule=rule: (rule.step(), always.step()) for rule in self.rules]
            self.rules = [SimpleNamespace(step=step) for step in both]
            self._activate()


def one_rank_misses(stage: int, torch_style: bool, gas: int, shared_way: bool) -> None:
    """The last rank's loss does not reach one block.

    Args:
        shared_way: The layer that both branches go through is always active, so that every loss asks for gradients.
    """
    hift: dict[str, Any] = {"blocks": [["^layers.0"], ["^layers.1"], ["^layers.2"]]}
    if shared_way:
        hift = {"blocks": hift["blocks"][1:], "always_active": ["^layers.0"]}
    engine = hift_engine(TwoWays(), stage, "fp32", hift, gas)
    oracle = WithAlways(TwoWays(), blocks_of(engine), gas)
    last = dist.get_rank() == dist.get_world_size() - 1

    def script(contestant: Any, step: int) -> None:
        for micro in range(gas):
            # The last rank takes branch 2 while branch 1 is to be trained, and the reverse.
            turn = step % 2 if shared_way else step % 3 - 1
            branch = {-1: 1, 0: 2 if last else 1, 1: 1 if last else 2}[turn]
            loss = loss_of(contestant(data(step, micro), branch=branch))
            if torch_style and not isinstance(contestant, TorchHiFT):
                loss.backward()
            else:
                contestant.backward(loss)
            contestant.step()

    assert_beside_oracle(script, engine, oracle, steps=7)


@pytest.mark.parametrize("shared_way", (False, True), ids=("nothing to train", "something to train"))
@pytest.mark.parametrize("torch_style", (False, True), ids=("engine.backward", "loss.backward"))
@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", (0, 1, 2))
def test_a_rank_whose_loss_misses_the_block_takes_part_with_zeros(two_ranks, stage, gas, torch_style, shared_way):
    on(two_ranks, one_rank_misses, stage, torch_style, gas, shared_way)
