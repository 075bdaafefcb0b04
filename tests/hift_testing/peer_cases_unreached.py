"""Cases of the peers: models of which a batch reaches only a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed import comm as dist
from hift_testing.peer_cases import (
    Layer,
    TorchHiFT,
    adamw,
    beside_oracle,
    blocks_of,
    data,
    distance,
    error_of,
    hift_engine,
    loss_of,
    messages,
    run,
    weights_of,
)
from torch import nn


class LayerDrop(nn.Module):
    """The step says which layers are left out, the same on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(6) for _ in range(3))
        self.head = nn.Linear(6, 6)

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


def _dropping(step: int, micro: int) -> dict[str, Any]:
    return {"kept": tuple(index for index in range(3) if (step + index) % 3 != 2 or step > 10)}


def _text_only(step: int, micro: int) -> dict[str, Any]:
    return {"image": None}


def _mixed(step: int, micro: int) -> dict[str, Any]:
    """Images at every third step, on all ranks."""
    return {"image": data(step, micro + 5) if step % 3 == 0 else None}


def _mixed_by_rank(step: int, micro: int) -> dict[str, Any]:
    """Only the last rank has images, at some steps."""
    here = dist.get_rank() == dist.get_world_size() - 1
    return {"image": data(step, micro + 5) if here and step % 3 == 0 else None}


def _routed(step: int, micro: int) -> dict[str, Any]:
    return {"expert": step // 2 % 2}


# name -> (model, section, what a batch reaches)
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any], Callable[[int, int], dict[str, Any]]]] = {
    "layer drop": (LayerDrop, {}, _dropping),
    "text only": (Seeing, {}, _text_only),
    "mixed": (Seeing, {}, _mixed),
    "mixed by rank": (Seeing, {}, _mixed_by_rank),
    "experts": (Routed, {"blocks": BY_EXPERT}, _routed),
}


def _script(name: str) -> Callable[[Any, int], None]:
    inputs = MODELS[name][2]

    def script(contestant: Any, step: int) -> None:
        for micro in range(contestant.gradient_accumulation_steps()):
            contestant.backward(loss_of(contestant(data(step, micro), **inputs(step, micro))))
            contestant.step()

    return script


def skipped_turns(name: str, stage: int, dtype: str = "fp32", gas: int = 1, cycles: int = 3) -> dict[str, Any]:
    """`no_gradient: skip` beside the oracle that passes over a block which no rank reaches."""
    model, hift, _ = MODELS[name]
    engine = hift_engine(model(), stage, dtype, {"no_gradient": "skip", **hift}, gas)
    oracle = TorchHiFT(model(), blocks_of(engine), dtype, gas, skip=True)
    start, script = weights_of(oracle), _script(name)
    steps = cycles * len(oracle.blocks)
    with messages() as read:
        error = error_of(lambda: run(script, engine, steps))
    run(script, oracle, steps)
    blocks = engine.hift.blocks
    missed = {blocks[engine.hift.order[turn]].name: oracle.skipped.count(turn) for turn in oracle.skipped}
    summary = engine.hift.summary()
    return {
        "error": error,
        "distance": distance(weights_of(engine), weights_of(oracle), start),
        "missed": missed,
        "unnamed": [block for block in missed if block not in summary],
        "summary": summary,
        "turns": (engine.global_steps, engine.hift.active_block, engine.hift.cycle),
        "expected turns": (steps, engine.hift.order[steps % len(blocks)], steps // len(blocks)),
        "warnings": [text for text in read if "gradient" in text and any(block in text for block in missed)],
        "cycles": cycles,
        "changed unreached": [
            fqn for block in blocks for fqn in block.fqns
            if missed.get(block.name) == cycles and not torch.equal(weights_of(engine)[fqn], start[fqn])
        ],
    }  # fmt: skip


def refused_turn(name: str, stage: int, gas: int = 1) -> dict[str, Any]:
    """The default: the step whose block is not reached raises, and changes nothing."""
    model, hift, _ = MODELS[name]
    engine = hift_engine(model(), stage, "fp32", hift, gas)
    script = _script(name)
    for step in range(2 * len(engine.hift.blocks)):
        before, active = weights_of(engine), engine.hift.blocks[engine.hift.active_block].name
        error = error_of(lambda s=step: script(engine, s))
        if error:
            after = weights_of(engine)
            moved = [fqn for fqn in before if not torch.equal(before[fqn], after[fqn])]
            return {"error": error, "active": active, "moved": moved, "step": step}
    return {"error": "", "active": "", "moved": [], "step": -1}


def windows_after_a_refused_turn(stage: int, gas: int, clear: bool, at_micro: str) -> dict[str, Any]:
    """A window whose block is not reached raises, is caught, and comes again with a batch that reaches it.

    Args:
        clear: Call `zero_grad` after the error.
        at_micro: Which micro steps of the window miss the block: `all` (then it raises), or `first` (then it trains).
    """
    engine = hift_engine(LayerDrop(), stage, "fp32", {}, gas)
    oracle = TorchHiFT(LayerDrop(), blocks_of(engine), "fp32", gas)
    start, raised = weights_of(oracle), []
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
    return {
        "raised": raised,
        "steps": engine.global_steps,
        "distance": distance(weights_of(engine), weights_of(oracle), start),
    }


class TwoWays(nn.Module):
    """A batch takes one of two branches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(6) for _ in range(3))

    def forward(self, x: torch.Tensor, branch: int) -> torch.Tensor:
        return self.layers[branch](self.layers[0](x))


def one_rank_misses(stage: int, torch_style: bool, gas: int, shared_way: bool) -> dict[str, Any]:
    """The last rank's loss does not reach one block.

    Args:
        shared_way: The layer that both branches go through is always active, so that every loss asks for gradients.
    """
    hift: dict[str, Any] = {"blocks": [["^layers.0"], ["^layers.1"], ["^layers.2"]]}
    if shared_way:
        hift = {"blocks": hift["blocks"][1:], "always_active": ["^layers.0"]}
    engine = hift_engine(TwoWays(), stage, "fp32", hift, gas)
    oracle = _WithAlways(TwoWays(), blocks_of(engine), gas)
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

    return beside_oracle(script, engine, oracle, 7)


class _WithAlways(TorchHiFT):
    """Parameters that are in no block train with each, with a state of their own."""

    def __init__(self, module: nn.Module, blocks: list[list[str]], gas: int) -> None:
        super().__init__(module, blocks, "fp32", gas)
        rest = [name for name in self.named if not any(name in block for block in blocks)]
        if rest:
            always = adamw([self.masters[name] for name in rest])
            self.blocks = [[*block, *rest] for block in self.blocks]
            self.rules = [_Both(rule, always) for rule in self.rules]
            self._activate()


class _Both:
    """Two optimizers that step together."""

    def __init__(self, *rules: torch.optim.Optimizer) -> None:
        self.rules = rules

    def step(self) -> None:
        for rule in self.rules:
            rule.step()
