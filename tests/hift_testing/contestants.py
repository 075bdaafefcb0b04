"""What the peers' tests share: a user's small models, three contestants with one interface, how far they are apart.

A script trains through `hift_ds.initialize`, through plain `deepspeed.initialize` and through `TorchHiFT`, one
torch.optim.AdamW a block in plain torch. Nothing of hift_ds but its public names is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from hift_testing.messages import error_of, is_clear
from hift_testing.ranks import RankPool
from hift_testing.training import DEVICE, DTYPES, cast_parameters, ds_config, whole_weights
from torch import nn

import hift_ds

WIDTH = 6
# A large rate, so that a lost or foreign update is far from rounding; eps: see training.ADAMW.
HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
ONE_BLOCK = {"layers_per_block": 1000}
# Of `distance`. fp32: sums in another order, divided by |gradient| + eps, measured below 2e-6; bf16: weights are
# rounded to 3 digits, and torch accumulates in bf16 where the engines do in fp32. A lost update is 0.2 and more.
BOUNDS = {"fp32": 1e-3, "bf16": 0.1}
HANG_S = 45


class Layer(nn.Module):
    """Residual, so that no gradient vanishes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    """Layers and a head; returns the head's output. As a user writes it: the loss is taken outside."""

    def __init__(self, seed: int = 0, layers: int = 2, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, width)
        self.to(DEVICE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.head.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def data(step: int, micro: int = 0, rows: int = 3, width: int = WIDTH) -> torch.Tensor:
    """This rank's batch."""
    seed = 1000 * step + 10 * micro + dist.get_rank()
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient depends on the batch."""
    return (output.float() - 1.0).square().mean()


def config_of(stage: int, dtype: str = "fp32", hift: dict[str, Any] | None = None, gas: int = 1, **keys: Any) -> Any:
    """A user's config; `hift` = None is plain DeepSpeed's, which needs a client optimizer."""
    section = {"type": "AdamW", "params": {**HYPER, "betas": list(HYPER["betas"])}}
    config = ds_config(stage, dtype, hift, **{"gradient_accumulation_steps": gas, "optimizer": section, **keys})
    if hift is None:
        del config["optimizer"]
        config["zero_allow_untested_optimizer"] = True
    return config


def adamw(params: Any, **changes: Any) -> torch.optim.AdamW:
    """The one update rule of all contestants."""
    return torch.optim.AdamW(params, foreach=False, **{**HYPER, **changes})


def hift_engine(module: nn.Module, stage: int, dtype: str = "fp32", hift: Any = None, gas: int = 1, **keys: Any) -> Any:
    """HiFT, a block per layer unless `hift` says otherwise."""
    return hift_ds.initialize(model=module, config=config_of(stage, dtype, hift or {}, gas, **keys))[0]


def plain_engine(module: nn.Module, stage: int, dtype: str = "fp32", gas: int = 1, **keys: Any) -> Any:
    """DeepSpeed without HiFT."""
    optimizer = adamw([param for param in module.parameters() if param.requires_grad])
    config = config_of(stage, dtype, None, gas, **keys)
    return deepspeed.initialize(model=module, config=config, optimizer=optimizer)[0]


class TorchHiFT:
    """The oracle: plain torch with an engine's interface; only the active block has gradients.

    Args:
        blocks: Lists of parameter names in visiting order.
        skip: A block that no rank's gradient reaches is passed over (`no_gradient: skip`), else that is an error.

    Attributes:
        start: Copies of the weights before any step.
    """

    def __init__(
        self, module: nn.Module, blocks: Sequence[Sequence[str]], dtype: str = "fp32", gas: int = 1, skip: bool = False,
        **changes: Any,
    ) -> None:  # fmt: skip
        self.module = cast_parameters(module.to(DEVICE), DTYPES[dtype])
        self.gas, self.skip, self.micro, self.turn, self.skipped = gas, skip, 0, 0, []
        self.named = dict(module.named_parameters())
        self.blocks = [list(block) for block in blocks]
        self.masters = {name: p.detach().float().clone() for name, p in self.named.items()}
        self.rules = [adamw([self.masters[name] for name in block], **changes) for block in self.blocks]
        self.start = whole_weights(self)
        self._activate()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def gradient_accumulation_steps(self) -> int:
        return self.gas

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        """A loss that misses the block has no gradient to give."""
        if loss.requires_grad:
            (loss / self.gas).backward(retain_graph=retain_graph)

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    coalesce_grad_reduction = no_sync

    def zero_grad(self) -> None:
        for param in self.named.values():
            param.grad = None

    def step(self) -> None:
        self.micro += 1
        if self.micro % self.gas == 0:
            self.update()

    def update(self) -> None:
        """The mean gradient of all ranks into the active block, then the next block's turn."""
        active = self.blocks[self.turn % len(self.blocks)]
        reached = torch.tensor([self.named[name].grad is not None for name in active], device=DEVICE).any().float()
        dist.all_reduce(reached)
        if reached or not self.skip:
            assert reached, f"no gradient for {active}"
            for name in active:
                grad = self.named[name].grad
                mean = torch.zeros_like(self.masters[name]) if grad is None else grad.float()
                dist.all_reduce(mean)
                self.masters[name].grad = mean / dist.get_world_size()
            self.rules[self.turn % len(self.blocks)].step()
            with torch.no_grad():
                for name in active:
                    self.named[name].copy_(self.masters[name])
        else:
            self.skipped.append(self.turn % len(self.blocks))
        self.turn += 1
        self.zero_grad()
        self._activate()

    def write(self, name: str, values: torch.Tensor) -> None:
        """A user's write into a weight: it is the parameter's value from here on."""
        with torch.no_grad():
            self.named[name].copy_(values)
            self.masters[name].copy_(self.named[name])

    def _activate(self) -> None:
        active = self.blocks[self.turn % len(self.blocks)]
        for name, param in self.named.items():
            param.requires_grad_(name in active)


def blocks_of(engine: Any) -> list[list[str]]:
    """Names of parameters by block, in visiting order."""
    return [list(engine.hift.blocks[index].fqns) for index in engine.hift.order]


def pair(
    build: Callable[[], nn.Module], stage: int, dtype: str = "fp32", hift: Any = None, gas: int = 1, **keys: Any
) -> tuple[Any, TorchHiFT]:
    """`hift_engine`, and its oracle on an equal module."""
    engine = hift_engine(build(), stage, dtype, hift, gas, **keys)
    return engine, TorchHiFT(build(), blocks_of(engine), dtype, gas)


def distance(weights: dict[str, Any], right: dict[str, Any], start: dict[str, Any]) -> float:
    """How far the worst parameter is from where it should be, as a share of how far it should have gone."""
    assert weights.keys() == right.keys()
    worst = 0.0
    for name, weight in weights.items():
        if weight.shape != right[name].shape:
            return float("inf")
        way = (right[name].float() - start[name].float()).norm()
        off = (weight.float() - right[name].float()).norm()
        worst = max(worst, (off / way.clamp_min(1e-3 * start[name].float().norm() + 1e-12)).item())
    return worst if worst == worst else float("inf")


def assert_near(contestant: Any, right: Any, dtype: str = "fp32", start: dict[str, Any] | None = None) -> None:
    """A contestant is where the right one is, but for rounding; `start`: where the oracle began. Collective."""
    found = distance(whole_weights(contestant), whole_weights(right), right.start if start is None else start)
    assert found <= BOUNDS[dtype], f"distance {found}"


def unmoved(weights: dict[str, Any], start: dict[str, Any]) -> list[str]:
    """Parameters that training has not changed."""
    return [name for name in weights if torch.equal(weights[name], start[name])]


def moved(weights: dict[str, Any], start: dict[str, Any]) -> list[str]:
    """Parameters that have changed."""
    return [name for name in weights if not torch.equal(weights[name], start[name])]


def shards_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what this rank keeps of each parameter between steps."""
    return {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in module.named_parameters()}


def on(pool: RankPool, case: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """`pool.run` that takes a silence of HANG_S for a hang; the start of the ranks does not count."""
    pool.run(dist.get_rank)
    return pool.run(case, *args, timeout_s=HANG_S, **kwargs)


Script = Callable[[Any, int], Any]


def train_step(engine: Any, step: int) -> None:
    """The usual loop of a window."""
    for micro in range(engine.gradient_accumulation_steps()):
        engine.backward(loss_of(engine(data(step, micro))))
        engine.step()


def run(script: Script, steps: int, *contestants: Any, start: int = 0) -> None:
    """`steps` windows of a script."""
    for contestant in contestants:
        for step in range(start, start + steps):
            script(contestant, step)


def beside_oracle(script: Script, engine: Any, oracle: TorchHiFT, steps: int) -> dict[str, Any]:
    """Both run the script; `error` of the engine, or its `distance` from the oracle. Collective."""
    start = oracle.start
    assert not moved(whole_weights(engine), start), "both must start alike"
    error = error_of(lambda: run(script, steps, engine))
    run(script, steps, oracle)
    weights, right = whole_weights(engine), whole_weights(oracle)
    assert not unmoved(right, start), "the oracle must train everything"
    return {"error": error, "distance": distance(weights, right, start), "unmoved": unmoved(weights, start)}


def assert_beside_oracle(script: Script, engine: Any, oracle: TorchHiFT, steps: int | None = None) -> None:
    """A script trains an engine as the oracle, by default in two cycles and a step. Collective."""
    found = beside_oracle(script, engine, oracle, steps or 2 * len(oracle.blocks) + 1)
    assert not found["error"], found["error"]
    assert found["distance"] <= BOUNDS["fp32"], found


def faults(found: dict[str, Any], dtype: str = "fp32", refusable: bool = False) -> list[str]:
    """What is wrong with HiFT's runs, rotating and with one block, beside the oracle; with `refusable` a clear error is
    as good as being right."""
    wrong = []
    for name in ("rotating", "one block"):
        error, far = found[name]["error"], found[name]["distance"]
        if error and not (refusable and is_clear(error)):
            wrong.append(f"{name}: {error[:300]}")
        elif not error and far > BOUNDS[dtype]:
            wrong.append(f"{name}: distance {far:.3g}, unmoved {found[name]['unmoved']} (plain: {found['plain']})")
    return wrong


def originals(module: nn.Module) -> dict[str, Any]:
    """What an engine may change on a module beside the weights."""
    return {
        "requires_grad": {name: param.requires_grad for name, param in module.named_parameters()},
        "hooks": {
            f"{name}.{kind}": len(hooks)
            for name, member in module.named_modules()
            for kind, hooks in vars(member).items()
            if kind.endswith("hooks") and hooks
        },
        "hooks of parameters": {
            name: len(hooks)
            for name, param in module.named_parameters()
            for hooks in (param._backward_hooks, getattr(param, "_post_accumulate_grad_hooks", None))
            if hooks
        },
        "attributes": {name: sorted(vars(param)) for name, param in module.named_parameters() if vars(param)},
        "gradients": [name for name, param in module.named_parameters() if param.grad is not None],
        "forward": "forward" in vars(module),
    }  # fmt: skip
