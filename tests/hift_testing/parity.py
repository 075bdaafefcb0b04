"""HiFT on ZeRO beside `ReferenceHiFT`, on ranks: `parity`, of which several files of tests take their combinations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed import comm as dist
from hift_testing import tolerances
from hift_testing.ranks import RankPool
from hift_testing.reference import LionByHand, ReferenceHiFT
from hift_testing.tiny_models import tiny_model
from hift_testing.tolerances import Tolerance
from hift_testing.training import (
    ADAMW,
    DEVICE,
    DTYPES,
    batch_of,
    cast_parameters,
    ds_config,
    engine_of,
    largest_difference,
    small_llama,
    whole_weights,
)
from transformers.modeling_outputs import ModelOutput

# rule -> (the config's section, torch.optim class, its hyper-parameters). eps: see training.ADAMW; Adagrad's first step
# moves a weight by lr * noise / eps.
RULES: dict[str, tuple[dict[str, Any], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (ADAMW, torch.optim.AdamW, ADAMW["params"]),
    "adam_l2": (
        {"type": "Adam", "params": {**ADAMW["params"], "adam_w_mode": False}}, torch.optim.Adam, ADAMW["params"],
    ),
    "sgd": (
        {"type": "SGD", "params": {"lr": 0.05, "weight_decay": 0.1}},
        torch.optim.SGD,
        {"lr": 0.05, "weight_decay": 0.1},
    ),
    "sgd_momentum": (
        {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9},
    ),
    "adagrad": (
        {"type": "Adagrad", "params": {"lr": 0.01, "eps": 1e-4}}, torch.optim.Adagrad, {"lr": 0.01, "eps": 1e-4},
    ),
    "adafactor": ({"type": "Adafactor", "params": {"lr": 0.02}}, torch.optim.Adafactor, {"lr": 0.02}),
    "lion": (
        {"type": "Lion", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.1}},
        LionByHand,
        {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1},
    ),
}  # fmt: skip


def parity(
    stage: int,
    dtype: str,
    hift: dict[str, Any],
    accumulation: int = 1,
    clip: float = 0.0,
    rotations: int = 2,
    *,
    family: str = "llama4",
    rule: str = "adamw",
    client: bool = False,
    groups: bool = False,
    zero_init: bool = False,
    backward: str = "engine",
    extra: dict[str, Any] | None = None,
    reference: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains HiFT on ZeRO and the reference for `rotations` rotations on the same batches. Collective.

    Args:
        family: `llama4` or `llama4_tied` (training.small_llama), or one of tiny_models.FAMILIES, or `moe`.
        client: Pass an optimizer object instead of a section of the config.
        groups: A decay and a no-decay param group with rates of their own (`decay_groups`).
        zero_init: Build the model inside deepspeed.zero.Init.
        backward: How gradients are asked for: see `_micro_steps`.
        extra: Further keys of the DeepSpeed config.
        reference: Further arguments of ReferenceHiFT; dtypes by their name in training.DTYPES.

    Returns:
        `weights`: largest difference of any weight. `share`: how many elements differ at all. `norm`: largest relative
        difference of the gradient norm. `moved`: how far the block that moved least moved. `blocks`: how many there
        are. `losses`: this rank's, by micro step.
    """
    section, optimizer_class, hyper = RULES[rule]
    config = ds_config(stage, dtype, hift, gradient_accumulation_steps=accumulation, gradient_clipping=clip,
                       **{**(extra or {}), "optimizer": copy.deepcopy(section)})  # fmt: skip
    if client:
        del config["optimizer"]
    micro_steps = 2 if backward in ("unmanaged", "no_sync") else accumulation
    module = _build_under_zero_init(family, config) if zero_init else build(family)
    arguments: dict[str, Any] = {}
    if client:
        arguments["optimizer"] = torch_optimizer(optimizer_class, list(module.named_parameters()), hyper, groups)
    elif groups:
        arguments["model_parameters"] = decay_groups(list(module.named_parameters()))
    engine = engine_of(config, module, **arguments)
    view = engine.hift
    steps_per_block = hift.get("steps_per_block", 1)
    steps = rotations * len(view.blocks) * steps_per_block
    start = whole_weights(engine)
    oracle = Oracle(
        family, dtype, rule, groups, tuple(tuple(block.fqns) for block in view.blocks), tuple(view.order),
        engine.block_plan.always_active, steps, micro_steps, clip, steps_per_block,
        accumulate_before_reducing=stage < 2 and micro_steps > 1, reset=hift.get("inactive_state") == "reset",
        further=tuple((reference or {}).items()),
    )  # fmt: skip
    if zero_init:
        model = build(family)
        model.load_state_dict(start, strict=False)
        # zero.Init makes buffers (rotary frequencies) in the weights' dtype; outside of it they stay fp32.
        for name, buffer in engine.module.named_buffers():
            model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer.clone())
        right = oracle.train(model)
    else:
        right = trained_once(oracle)
    assert largest_difference(start, right.start) == 0.0, "the two must start alike"
    norms, losses = [], []
    for step in range(steps):
        mine = [batch(family, step, micro, dist.get_rank()) for micro in range(micro_steps)]
        losses += _MICRO_STEPS[backward](engine, mine)
        norms.append(engine.get_global_grad_norm())
    weights = whole_weights(engine)
    return {
        "weights": largest_difference(weights, right.end),
        "share": share_that_differs(weights, right.end),
        "norm": max(abs(a - b) / b for a, b in zip(norms, right.norms, strict=True)),
        "moved": min(
            largest_difference({n: weights[n] for n in block.fqns}, {n: start[n] for n in block.fqns})
            for block in view.blocks
        ),
        "blocks": len(view.blocks),
        "losses": losses,
    }


def agree(
    pool: RankPool,
    stage: int,
    dtype: str,
    hift: dict[str, Any],
    *args: Any,
    blocks: int = 2,
    weights: Tolerance | None = None,
    share: Tolerance | None = None,
    norm: Tolerance = tolerances.NORM,
    moved: float = 1e-4,
    **kwargs: Any,
) -> None:
    """`parity` on every rank; `weights` and `share` are tolerances, by default the strictest of weights."""
    if weights is None:
        weights = tolerances.STAGE3 if stage == 3 and dtype == "fp32" else tolerances.EXACT
    for facts in pool.run(parity, stage, dtype, hift, *args, **kwargs):
        name, tolerance = ("weights", weights) if share is None else ("share", share)
        assert facts[name] <= tolerance.bound, (facts, tolerance.reason)
        assert facts["norm"] <= norm.bound, (facts, norm.reason)
        assert all(math.isfinite(loss) for loss in facts["losses"]), facts
        assert facts["moved"] > moved, facts
        assert facts["blocks"] == blocks, facts


class Trained(NamedTuple):
    """What a reference run leaves: weights before and after, and the gradient norm of each step."""

    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]
    norms: list[float]


@dataclass(frozen=True)
class Oracle:
    """A run of `ReferenceHiFT` on every rank's batches; the arguments are `parity`'s, the engine's plan and the rest
    `ReferenceHiFT`'s."""

    family: str
    dtype: str
    rule: str
    groups: bool
    blocks: tuple[tuple[str, ...], ...]
    order: tuple[int, ...]
    always: tuple[str, ...]
    steps: int
    micro_steps: int
    clip: float
    steps_per_block: int
    accumulate_before_reducing: bool
    reset: bool
    further: tuple[tuple[str, Any], ...]

    def train(self, model: torch.nn.Module) -> Trained:
        """Trains an fp32 model, cast to the run's dtype."""
        model = cast_parameters(model, DTYPES[self.dtype])
        start = {name: weight.clone() for name, weight in _weights(model).items()}
        _, kind, hyper = RULES[self.rule]
        reference = ReferenceHiFT(
            model, self.blocks, self.order, lambda members: torch_optimizer(kind, members, hyper, self.groups), None,
            self.clip, self.steps_per_block, self.always, self.accumulate_before_reducing, self.reset,
            **{key: DTYPES.get(value, value) for key, value in self.further},
        )  # fmt: skip
        for step in range(self.steps):
            reference.step([
                [batch(self.family, step, micro, rank) for micro in range(self.micro_steps)]
                for rank in range(dist.get_world_size())
            ])  # fmt: skip
        return Trained(start, _weights(model), reference.norms)


@cache
def trained_once(oracle: Oracle) -> Trained:
    """From the start that every process builds; once in a process, for all stages that ask for the same."""
    return oracle.train(build(oracle.family))


def build(family: str) -> torch.nn.Module:
    """The same fp32 model in every process."""
    if family in ("llama4", "llama4_tied"):
        return small_llama(tied=family.endswith("tied"))
    torch.manual_seed(0)
    return (RoutedByHand() if family == "moe" else tiny_model(family)).to(DEVICE)


def batch(family: str, step: int, micro: int, rank: int) -> dict[str, torch.Tensor]:
    """What a rank trains on at a micro step, the same in every process."""
    tokens = batch_of(step, micro, rank)
    if family == "vit":
        generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
        return {
            "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
            "labels": torch.randint(0, 3, (2,), generator=generator),
        }
    if family == "bert":
        return {"input_ids": tokens["input_ids"], "labels": tokens["input_ids"][:, 0] % 3}
    if family == "moe":
        return {**tokens, "expert": (step + rank) % len(RoutedByHand.EXPERTS)}
    return tokens


class Expert(torch.nn.Module):
    """A two-layer network that may or may not be called."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(24, 40), torch.nn.Linear(40, 24)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Experts(torch.nn.Module):
    """Runs the expert that the batch names: the others have no gradient in this micro step."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.widen, self.narrow = torch.nn.Linear(24, 48), torch.nn.Linear(48, 24)
        self.experts = torch.nn.ModuleList(Expert() for _ in range(count))

    def forward(self, hidden: torch.Tensor, expert: int) -> torch.Tensor:
        return self.experts[expert](hidden + self.narrow(torch.tanh(self.widen(hidden))))


class RoutedByHand(torch.nn.Module):
    """A mixture of experts in which each rank uses another expert."""

    EXPERTS = range(3)

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(96, 24)
        self.layers = torch.nn.ModuleList(Experts(len(self.EXPERTS)) for _ in range(2))
        self.head = torch.nn.Linear(24, 96)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, expert: int) -> Any:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, expert)
        loss = torch.nn.functional.cross_entropy(self.head(hidden).flatten(0, 1).float(), labels.flatten())
        return ModelOutput(loss=loss)


def decay_groups(members: list[tuple[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Matrices decay, the rest does not and learns twice as fast. Neither group is empty in any block."""
    matrices = [tensor for _, tensor in members if _is_matrix(tensor)]
    others = [tensor for _, tensor in members if not _is_matrix(tensor)]
    found = [{"params": others, "weight_decay": 0.0, "lr": 2e-3}, {"params": matrices, "weight_decay": 0.3, "lr": 5e-4}]
    return [group for group in found if group["params"]]


def _is_matrix(tensor: torch.Tensor) -> bool:
    return len(getattr(tensor, "ds_shape", tensor.shape)) >= 2


def torch_optimizer(
    optimizer_class: type[torch.optim.Optimizer],
    members: list[tuple[str, torch.Tensor]],
    hyper: dict[str, Any],
    groups: bool,
) -> torch.optim.Optimizer:
    found = decay_groups(members) if groups else [{"params": [tensor for _, tensor in members]}]
    foreach = {} if optimizer_class is LionByHand else {"foreach": False}
    return optimizer_class(found, **foreach, **hyper)


def _build_under_zero_init(family: str, config: dict[str, Any]) -> torch.nn.Module:
    with deepspeed.zero.Init(config_dict_or_path={k: v for k, v in config.items() if k != "hift"}):
        module = build(family)
    assert all(hasattr(param, "ds_id") for param in module.parameters())
    return module


def share_that_differs(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Elements that are not equal, as a share of all."""
    total = sum(tensor.numel() for tensor in left.values())
    return sum((left[name] != right[name]).sum().item() for name in left) / total


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in model.named_parameters()}


def _through_engine(engine: Any, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    losses = []
    for inputs in batches:
        losses.append(engine(**inputs).loss)
        engine.backward(losses[-1])
        engine.step()
    return [loss.item() for loss in losses]


def _through_loss(engine: Any, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    losses = []
    for inputs in batches:
        losses.append(engine(**inputs).loss)
        losses[-1].backward()
        engine.step()
    return [loss.item() for loss in losses]


def _unmanaged(engine: Any, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """`managed_gradient_accumulation: false`: as many backwards as the caller likes, then one step."""
    losses = []
    for inputs in batches:
        losses.append(engine(**inputs).loss)
        engine.backward(losses[-1] / len(batches))
    engine.step()
    return [loss.item() for loss in losses]


def _no_sync(engine: Any, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """Stages 0 and 1: gradients of all but the last backward stay on their rank."""
    losses = []
    for inputs in batches[:-1]:
        losses.append(engine(**inputs).loss)
        with engine.no_sync():
            engine.backward(losses[-1] / len(batches))
    losses.append(engine(**batches[-1]).loss)
    engine.backward(losses[-1] / len(batches))
    engine.step()
    return [loss.item() for loss in losses]


_MICRO_STEPS: dict[str, Callable[[Any, list[dict[str, torch.Tensor]]], list[float]]] = {
    "engine": _through_engine,
    "loss": _through_loss,
    "unmanaged": _unmanaged,
    "no_sync": _no_sync,
}
