"""Cases of the peers: what a user does to parameters behind a living engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from hift_testing.peer_cases import (
    ONE_BLOCK,
    Layer,
    Stack,
    TorchHiFT,
    blocks_of,
    config_of,
    data,
    distance,
    error_of,
    hift_engine,
    loss_of,
    messages,
    originals,
    plain_engine,
    run,
    train_step,
    unmoved,
    weights_of,
)
from hift_testing.training import DEVICE, batch_of, small_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

import hift_ds


def _embedding(rows: int) -> Callable[[nn.Module], Any]:
    return lambda module: module.resize_token_embeddings(rows, mean_resizing=False)


def _add(module: nn.Module) -> None:
    module.layers[0].extra = nn.Parameter(torch.ones(3))


def _add_to_head(module: nn.Module) -> None:
    module.head.extra = nn.Parameter(torch.ones(3))


def _remove_bias(module: nn.Module) -> None:
    module.layers[0].linear.bias = None


def _replace(module: nn.Module) -> None:
    """The same name and shape, another parameter: as a new head for another task."""
    module.head.weight = nn.Parameter(torch.zeros_like(module.head.weight))


def _new_head(module: nn.Module) -> None:
    """Another module in its place: ZeRO-3 has no hooks on it."""
    module.head = nn.Linear(6, 6).to(DEVICE)


def _other_shape(module: nn.Module) -> None:
    module.head.weight.data = torch.zeros(2, 6)
    module.head.bias.data = torch.zeros(2)


def _new_data(module: nn.Module) -> None:
    """Same shape in other memory, as `load_state_dict(assign=True)` or `module.to(...)` leave it."""
    module.head.weight.data = module.head.weight.data.clone()


# name -> (model, what is done, a name that the error holds)
CHANGES: dict[str, tuple[str, Callable[[nn.Module], Any], str]] = {
    "more tokens": ("llama", _embedding(100), "embed_tokens|lm_head"),
    "fewer tokens": ("llama", _embedding(90), "embed_tokens|lm_head"),
    "more tokens, tied": ("tied", _embedding(100), "embed_tokens|lm_head"),
    "parameter added": ("stack", _add, r"layers\.0\.extra"),
    "parameter added to a block that waits": ("stack", _add_to_head, r"head\.extra"),
    "parameter removed": ("stack", _remove_bias, r"layers\.0\.linear\.bias"),
    "parameter replaced": ("stack", _replace, r"head\.weight"),
    "module replaced": ("stack", _new_head, r"head\.weight"),
    "other dtype": ("stack", lambda module: module.bfloat16(), r"layers\.0|head"),
    "other shape": ("stack", _other_shape, r"head\.weight|head\.bias"),
}


def _build(model: str) -> nn.Module:
    return Stack() if model == "stack" else small_llama(layers=2, tied=model == "tied")


def _step(engine: Any, model: str, step: int) -> None:
    if model == "stack":
        train_step(engine, step)
        return
    tokens = batch_of(step, 0, dist.get_rank())["input_ids"] % 90
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()


def changed_module(name: str, stage: int, before: int = 2) -> dict[str, Any]:
    """A change after `before` steps, then steps until one raises, at most a cycle of them."""
    model, change, words = CHANGES[name]
    module = _build(model)
    engine = hift_engine(module, stage)
    for step in range(before):
        _step(engine, model, step)
    change(module)
    start = {key: _shard(tensor).clone() for key, tensor in module.named_parameters()}
    error, steps = "", 0
    while not error and steps < len(engine.hift.blocks):
        error = error_of(lambda s=steps: _step(engine, model, before + s))
        steps += 1
    left = dict(module.named_parameters())
    moved = [key for key in start if not torch.equal(start[key], _shard(left[key]))]
    after = error_of(engine.destroy)
    hooks = originals(module)["hooks"]
    return {"error": error, "steps": steps, "moved": moved, "words": words, "after": after, "hooks": hooks}


def changed_between_checkpoints(name: str, stage: int, folder: str) -> dict[str, Any]:
    """A save, a change, and what a second save, a load and a state dict say then; files that the change has made."""
    model, change, words = CHANGES[name]
    engine = hift_engine(_build(model), stage, "fp32")
    _step(engine, model, 0)
    engine.save_checkpoint(folder, "good")
    change(engine.module)
    weights = {key: _shard(param).clone() for key, param in engine.module.named_parameters()}
    errors = {
        "save": error_of(lambda: engine.save_checkpoint(folder, "bad")),
        "load": error_of(lambda: engine.load_checkpoint(folder, "good")),
        "state_dict": error_of(engine.optimizer.state_dict),
    }
    left = dict(engine.module.named_parameters())
    moved = [key for key in weights if not torch.equal(weights[key], _shard(left[key]))]
    engine.destroy()
    return {"words": words, "errors": errors, "moved": moved, "written": Path(folder, "bad").exists()}


def _shard(param: torch.Tensor) -> torch.Tensor:
    """What this rank keeps of a parameter between steps."""
    return getattr(param, "ds_tensor", param).detach()


def new_memory(stage: int) -> dict[str, Any]:
    """Weights in other memory, of the same values: training goes on as if nothing were, or one clear error."""
    module = Stack()
    engine = hift_engine(module, stage)
    oracle = TorchHiFT(Stack(), blocks_of(engine))
    run(train_step, engine, 2)
    run(train_step, oracle, 2)
    start = weights_of(oracle)
    _new_data(module)
    error = error_of(lambda: run(train_step, engine, 4, 2))
    run(train_step, oracle, 4, 2)
    return {"error": error, "distance": distance(weights_of(engine), weights_of(oracle), start)}


def writes(stage: int, dtype: str, names: list[str], one_block: bool = False) -> dict[str, Any]:
    """In-place writes under no_grad between steps (a projection, an EMA swapped in, a re-initialised layer)."""
    module = Stack()
    engine = hift_engine(module, stage, dtype, ONE_BLOCK if one_block else {})
    oracle = TorchHiFT(Stack(), blocks_of(engine), dtype)
    start, params, stale = weights_of(oracle), dict(module.named_parameters()), []
    for step in range(2 * len(oracle.blocks) + 1):
        if step in (1, 3, 4):
            _write(module, oracle, names, step)
        if step == 3:  # a reading is not to stand for the step's own look at what was written
            read = {name: deepspeed.utils.safe_get_full_fp32_param(params[name]) for name in names}
            stale = [name for name in names if not torch.equal(read[name], oracle.masters[name])]
        train_step(engine, step)
        train_step(oracle, step)
    return {"distance": distance(weights_of(engine), weights_of(oracle), start), "stale": stale}


def _write(module: nn.Module, oracle: TorchHiFT, names: list[str], step: int) -> None:
    params = dict(module.named_parameters())
    for name in names:
        values = oracle.named[name].detach() * 0.5 + 0.1 * step
        oracle.write(name, values)
        if hasattr(params[name], "ds_id"):
            with deepspeed.zero.GatheredParameters([params[name]], modifier_rank=0):
                if dist.get_rank() == 0:
                    params[name].data.copy_(values)
        else:
            with torch.no_grad():
                params[name].copy_(values)


def gradients_before(stage: int, dtype: str, first: str = "hift") -> dict[str, Any]:
    """The model comes from a torch loop that did not clear its gradients."""
    module, twin = Stack(), Stack()
    (1e3 * loss_of(module(data(9)))).backward()
    make = (lambda m: hift_engine(m, stage, dtype)) if first == "hift" else (lambda m: plain_engine(m, stage, dtype))
    engine, other = make(module), make(twin)
    start = weights_of(other)
    run(train_step, engine, 6)
    run(train_step, other, 6)
    return {"distance": distance(weights_of(engine), weights_of(other), start)}


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 6)
        self.layers = nn.ModuleList(Layer(6) for _ in range(2))
        self.head = nn.Linear(6, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def frozen_tied(stage: int, regex: str) -> dict[str, Any]:
    """`frozen` on one of a tensor's two names, in a cycle."""
    module = Tied()
    engine = hift_engine(module, stage, "fp32", {"frozen": [regex]})
    start = weights_of(engine)
    for step in range(2 * len(engine.hift.blocks)):
        x = torch.arange(4).reshape(2, 2) + step % 4
        engine.backward(loss_of(engine(x)))
        engine.step()
    return {"unmoved": unmoved(weights_of(engine), start)}


def switched_off(stage: int, name: str) -> dict[str, Any]:
    """A user's `requires_grad_(False)` in the middle, in the parameter's turn (else it is off anyway)."""
    module = Stack()
    engine = hift_engine(module, stage)
    turn = [name in block for block in blocks_of(engine)].index(True)
    run(train_step, engine, 3 + turn)
    start = weights_of(engine)
    with messages() as read:
        dict(module.named_parameters())[name].requires_grad_(False)
        error = error_of(lambda: run(train_step, engine, 6, 3 + turn))
    warned = [text for text in read if name in text or "requires_grad" in text]
    return {"error": error, "unmoved": unmoved(weights_of(engine), start), "warnings": warned}


class Complex(nn.Module):
    """A spectral layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(6) for _ in range(2))
        self.filter = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6)


def complex_parameter(stage: int) -> str:
    module = Complex()
    return error_of(lambda: hift_ds.initialize(model=module, config=config_of(stage, hift={})))


class Partly(nn.Module):
    """Each layer has a linear map within torch's reentrant checkpoint and one outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"inside": Layer(6), "outside": Layer(6)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["outside"](checkpoint(layer["inside"], x, use_reentrant=True))
        return x


def partly_reentrant(stage: int, cycles: int = 4) -> dict[str, Any]:
    """Bottom-up: `layers.0.inside` has inputs that ask for no gradient at each of its turns."""
    engine = hift_engine(Partly(), stage)
    errors = [error_of(lambda s=step: train_step(engine, s)) for step in range(cycles * len(engine.hift.blocks))]
    return {"errors": errors, "blocks": len(engine.hift.blocks)}


class Sometimes(nn.Module):
    """A layer with an adapter that only every other batch of its block's turns goes through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"a": Layer(6), "b": Layer(6)}) for _ in range(2))

    def forward(self, x: torch.Tensor, with_b: bool) -> torch.Tensor:
        for layer in self.layers:
            x = layer["a"](x)
            x = layer["b"](x) if with_b else x
        return x


def sometimes(stage: int) -> dict[str, Any]:
    """Gradients in every other turn are enough."""
    engine = hift_engine(Sometimes(), stage)
    oracle = TorchHiFT(Sometimes(), blocks_of(engine))
    start = weights_of(oracle)

    def script(contestant: Any, step: int) -> None:
        contestant.backward(loss_of(contestant(data(step), with_b=step // 2 % 2 == 1)))
        contestant.step()

    error = error_of(lambda: run(script, engine, 10))
    run(script, oracle, 10)
    return {"error": error, "distance": distance(weights_of(engine), weights_of(oracle), start)}
