"""Steps that cannot be taken as they should: ranks that disagree, blocks without a gradient, bad numbers, errors."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm as dist
from hift_testing.contestants import Layer, Stack, data, loss_of
from hift_testing.fingerprints import all_by_block, changed, digest_of, weights_by_block
from hift_testing.messages import error_of, logged
from hift_testing.training import ds_config, engine_of, run_steps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint


def ranks_disagree(stage: int, hift: dict[str, Any] | None = None) -> None:
    """The last rank believes that another block's turn has come: an error on all, and nothing has changed."""
    engine = engine_of(ds_config(stage, "fp32", hift or {}))
    run_steps(engine, 2)
    before = weights_by_block(engine)
    if dist.get_rank() == dist.get_world_size() - 1:
        engine.optimizer.rotation.step += 1
    error = error_of(lambda: run_steps(engine, 1, start=2)) or error_of(engine.optimizer.settle)
    assert error.startswith("RuntimeError: ranks disagree on the active block"), error
    assert changed(before, weights_by_block(engine)) == []


class TwoWays(nn.Module):
    """Two branches after a common layer; a batch takes one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(6) for _ in range(3))

    def forward(self, x: torch.Tensor, branch: int) -> torch.Tensor:
        return self.layers[branch](self.layers[0](x))


def branch_steps(stage: int, branches: tuple[int, int], steps: int, hift: dict[str, Any] | None = None) -> Any:
    """Rank r's batches go through branch `branches[r]` at every step; three blocks."""
    hift = {"blocks": [["^layers.0"], ["^layers.1"], ["^layers.2"]], **(hift or {})}
    engine = engine_of(ds_config(stage, "fp32", hift), TwoWays())
    rank, before = dist.get_rank(), weights_by_block(engine)

    def train() -> None:
        for step in range(steps):
            engine.backward(loss_of(engine(data(step), branches[rank])))
            engine.step()

    error = error_of(train) or error_of(engine.optimizer.settle)
    after = weights_by_block(engine)
    counts = [state.step for state in engine.optimizer.states]
    return {"error": error, "changed": changed(before, after), "digest": digest_of(after), "counts": counts}


def poison_next_gradient(engine: Any, value: float = float("nan")) -> None:
    """One element of one gradient of the active block becomes `value` on the last rank, at the next backward only."""
    if dist.get_rank() < dist.get_world_size() - 1:
        return
    fqn = engine.hift.blocks[engine.hift.active_block].fqns[-1]

    def poison(grad: torch.Tensor) -> torch.Tensor:
        handle.remove()
        grad = grad.clone()
        grad.view(-1)[-1] = value
        return grad

    handle = dict(engine.module.named_parameters())[fqn].register_hook(poison)


def poisoned_run(
    stage: int, dtype: str, value: float, steps: int, poisoned: int, hift: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One non-finite gradient element, on the last rank, at step `poisoned` (counted in engine.step() calls)."""
    engine = engine_of(ds_config(stage, dtype, hift or {}))
    found: dict[str, Any] = {"changed": [], "blocks": [], "applied": []}
    with logged("hift_ds.zero") as found["warnings"]:
        for step in range(steps):
            before = all_by_block(engine)
            if step == poisoned:
                poison_next_gradient(engine, value)
            run_steps(engine, 1, start=step)
            found["changed"].append(changed(before, all_by_block(engine)))
            found["blocks"].append(engine.hift.active_block)
            found["applied"].append(engine.was_step_applied())
    found.update(skipped=engine.skipped_steps, digest=digest_of(weights_by_block(engine)))
    found["counts"] = [state.step for state in engine.optimizer.states]
    return found


def stopped_run(stage: int, dtype: str, hift: dict[str, Any]) -> tuple[list[str], list[str], int]:
    """`not_finite` "stop": what four steps raise, of which the third is poisoned, what moved meanwhile, and skips."""
    engine = engine_of(ds_config(stage, dtype, {**hift, "not_finite": "stop"}))
    errors, moved = [], []
    for step in range(4):
        before = weights_by_block(engine)  # to ask for state would be to hear of the step
        if step == 2:
            poison_next_gradient(engine, float("nan"))
        errors.append(error_of(lambda step=step: run_steps(engine, 1, start=step)))
        moved += [changed(before, weights_by_block(engine))] if errors[-1] or step == 2 else []
    errors.append(error_of(lambda: run_steps(engine, 2, start=4)))  # it goes on
    return errors, moved, engine.skipped_steps


class Reentrant(nn.Module):
    """Calls torch's reentrant checkpoint itself, where nothing of ours can switch it."""

    def __init__(self, head: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(6, 6) if head else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return self.head(x).square().mean()


class _Fuse(torch.autograd.Function):
    """Fails in backward while its switch is on."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, switch: list[bool]) -> torch.Tensor:
        ctx.switch = switch
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.switch[0]:
            raise RuntimeError("CUDA out of memory, as it were")
        return grad, None


class Fused(Stack):
    """Its backward fails at the output of a layer, once the gradients of those above are there."""

    def __init__(self, where: int) -> None:
        super().__init__(layers=3)
        self.where, self.switch = where, [False]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.head.weight.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == self.where:
                x = _Fuse.apply(x, self.switch)
        return self.head(x)


class OutOfMemory(TorchDispatchMode):
    """The `nth` operation inside that makes a new tensor has no memory for it."""

    MAKES = ("empty", "new_", "zeros", "ones", "full", "clone", "_to_copy", "cat")

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.left = nth

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = function.overloadpacket.__name__.startswith(self.MAKES) and isinstance(result, torch.Tensor)
        if made and result.numel() > 1:
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError("CUDA out of memory, as it were")
        return result
