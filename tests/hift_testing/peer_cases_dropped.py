"""Cases of the peers: gradients that were computed and must not enter an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from hift_testing.peer_cases import (
    BOUNDS,
    ONE_BLOCK,
    Layer,
    Stack,
    TorchHiFT,
    adamw,
    beside_oracle,
    blocks_of,
    config_of,
    data,
    distance,
    error_of,
    hift_engine,
    loss_of,
    plain_engine,
    train_step,
    unmoved,
    weights_of,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hift_ds


class Contestant:
    """An engine and the object whose `zero_grad` a script calls."""

    def __init__(self, engine: Any, zero: Callable[[], None]) -> None:
        self.engine, self.zero_grad, self.module = engine, zero, engine.module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, *args: Any) -> Any:
        return self.engine(*args)


def _bad(engine: Any, step: int) -> None:
    engine.backward(1e3 * loss_of(engine(data(step, 7))))


def bad_batch_first(engine: Any, step: int) -> None:
    """A bad batch is noticed after backward and before step."""
    _bad(engine, step)
    engine.zero_grad()
    train_step(engine, step)


def bad_batch_in_the_window(engine: Any, step: int) -> None:
    """The bad batch comes after a good one, which goes with it; the window then starts anew."""
    engine.backward(loss_of(engine(data(step, 8))))
    _bad(engine, step)
    engine.zero_grad()
    train_step(engine, step)


def bad_micro_step(engine: Any, step: int) -> None:
    """With accumulation: a whole micro step, its `step` and all, is dropped; the rest of the window counts."""
    for micro in range(engine.gradient_accumulation_steps()):
        engine.backward(loss_of(engine(data(step, micro))))
        if micro == 0 and engine.gradient_accumulation_steps() > 1:
            engine.step()
            engine.zero_grad()
        else:
            engine.step()


def before_each_window(engine: Any, step: int) -> None:
    """As in every torch tutorial."""
    engine.zero_grad()
    train_step(engine, step)


def after_each_step(engine: Any, step: int) -> None:
    """Between backward of a window's last micro step and its end nothing is dropped by a call after `step`."""
    train_step(engine, step)
    engine.zero_grad()


SCRIPTS = {
    script.__name__: script
    for script in (bad_batch_first, bad_batch_in_the_window, bad_micro_step, before_each_window, after_each_step)
}


def dropped(name: str, by: str, stage: int, dtype: str = "fp32", gas: int = 1) -> dict[str, Any]:
    """A script with `zero_grad` of the `engine`, the `module`, the returned `optimizer` or the caller's (`client`)."""
    found = {}
    for way, hift in (("rotating", {}), ("one block", ONE_BLOCK), ("plain", None)):
        module = Stack()
        client = adamw(module.parameters())
        config = config_of(stage, dtype, hift, gas)
        config.pop("optimizer", None)
        initialize = deepspeed.initialize if hift is None else hift_ds.initialize
        engine, optimizer, _, _ = initialize(model=module, config=config, optimizer=client)
        zero = {"engine": engine, "optimizer": optimizer, "client": client, "module": module}[by].zero_grad
        blocks = [[fqn for fqn, _ in module.named_parameters()]] if hift is None else blocks_of(engine)
        oracle = TorchHiFT(Stack(), blocks, dtype, gas)
        found[way] = beside_oracle(SCRIPTS[name], Contestant(engine, zero), oracle, 2 * len(blocks) + 1)
    return found


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


class Fused(nn.Module):
    """A Stack whose backward fails at the output of a layer, once the gradients of those above are there."""

    def __init__(self, where: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(6) for _ in range(3))
        self.head = nn.Linear(6, 6)
        self.where, self.switch = where, [False]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.head.weight.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == self.where:
                x = _Fuse.apply(x, self.switch)
        return self.head(x)


def failing_backwards(stage: int, where: int, hift: dict[str, Any], gas: int = 1, torch_style: bool = False) -> Any:
    """Each window's backward fails once on every rank, is caught, `zero_grad`, and the window comes again."""
    engine = hift_engine(Fused(where), stage, "fp32", hift, gas)
    oracle = TorchHiFT(Fused(where), blocks_of(engine), "fp32", gas)
    switch = engine.module.switch
    raised = []

    def script(contestant: Any, step: int) -> None:
        if contestant is engine:
            switch[0] = True
            loss = 1e3 * loss_of(engine(data(step, 7)))
            raised.append(error_of(loss.backward if torch_style else lambda: engine.backward(loss)))
            switch[0] = False
            engine.zero_grad()
        train_step(contestant, step)

    found = beside_oracle(script, engine, oracle, 2 * len(oracle.blocks) + 1)
    # With the active block above the fuse, backward never comes to it.
    found["raised"] = sorted(set(raised))
    return found


def failing_second_micro_step(stage: int, zeroes: bool) -> dict[str, Any]:
    """With accumulation, a backward fails where half of a window is there; the oracle never sees that window."""
    module = Fused(2)
    engine = hift_engine(module, stage, "fp32", {}, 2)
    oracle = TorchHiFT(Fused(2), blocks_of(engine), "fp32", 2)
    raised = []

    def script(contestant: Any, step: int) -> None:
        if contestant is engine and engine.hift.active_block < 3:  # the head's backward would not come so far
            engine.backward(1e3 * loss_of(engine(data(step, 7))))
            engine.step()
            module.switch[0] = True
            raised.append(error_of(lambda: engine.backward(loss_of(engine(data(step, 8))))))
            module.switch[0] = False
            if zeroes:
                engine.zero_grad()
        train_step(contestant, step)

    found = beside_oracle(script, engine, oracle, 2 * len(engine.hift.blocks) + 1)
    return {**found, "raised": raised}


def one_rank_fails(stage: int, zeroes: bool) -> dict[str, Any]:
    """The backward of one micro step fails on rank 0 alone, which steps all the same: its part is missing, no more."""
    module = Fused(2)
    engine = hift_engine(module, stage, "fp32", ONE_BLOCK, 3)
    start, raised = weights_of(engine), ""
    for step in range(3):
        for micro in range(3):
            module.switch[0] = fails = (dist.get_rank(), step, micro) == (0, 1, 1)
            error = error_of(lambda s=step, m=micro: engine.backward(loss_of(engine(data(s, m)))))
            raised = raised or error
            if fails and zeroes:
                engine.zero_grad()
            engine.step()
    weights = weights_of(engine)
    sums = {name: float(weight.double().sum()) for name, weight in weights.items()}
    return {"raised": raised, "sums": sums, "steps": engine.global_steps, "unmoved": unmoved(weights, start)}


def step_after_a_failed_backward(stage: int, torch_style: bool) -> dict[str, Any]:
    """The backward fails half way, is caught, and the user steps all the same; then trains on."""
    module = Fused(1)
    engine = hift_engine(module, stage, "fp32", ONE_BLOCK)
    start = weights_of(engine)
    module.switch[0] = True
    loss = loss_of(engine(data(0)))
    raised = error_of(loss.backward if torch_style else lambda: engine.backward(loss))
    module.switch[0] = False
    error, unchanged = error_of(engine.step), len(unmoved(weights_of(engine), start)) == len(start)
    twin = hift_engine(Fused(1), stage, "fp32", ONE_BLOCK)
    for step in (1, 2):
        train_step(engine, step)
        train_step(twin, step)
    return {
        "raised": raised, "error": error, "unchanged": unchanged,
        "distance": distance(weights_of(engine), weights_of(twin), start),
    }  # fmt: skip


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


def out_of_memory_in_step(stage: int, dtype: str, hift: dict[str, Any], most: int = 40) -> dict[str, Any]:
    """A step fails at each of its tensors in turn, is caught, and the batch comes again.

    Returns:
        `refused`: in how many of the runs the next forward said that the update had ended half way; `right`: in how
        many training went on as the oracle's; `wrong`: the others, by the tensor.
    """
    found: dict[str, Any] = {"refused": 0, "right": 0, "wrong": {}}
    for nth in range(1, most):
        engine = hift_engine(Stack(), stage, dtype, hift)
        oracle = TorchHiFT(Stack(), blocks_of(engine), dtype)
        start = weights_of(oracle)
        for contestant in (engine, oracle):
            for step in range(4):
                train_step(contestant, step)
        engine.backward(loss_of(engine(data(4))))
        with OutOfMemory(nth) as memory:
            error = error_of(engine.step)
        if memory.left > 0:
            break
        assert error.startswith("OutOfMemoryError"), error
        engine.zero_grad()
        again = error_of(lambda e=engine: [train_step(e, step) for step in range(4, 8)])
        for step in range(4, 8):
            train_step(oracle, step)
        far = 0.0 if again else distance(weights_of(engine), weights_of(oracle), start)
        if "ended with an error half way" in again:
            found["refused"] += 1
        elif again or far > BOUNDS[dtype]:
            found["wrong"][nth] = again or far
        else:
            found["right"] += 1
    return found


def changed_by_a_failed_step(stage: int, dtype: str, hift: dict[str, Any], most: int = 40) -> dict[int, list[str]]:
    """What a step has changed that failed at its nth tensor, where the engine does not say so; by that tensor."""
    found: dict[int, list[str]] = {}
    for nth in range(1, most):
        engine = hift_engine(Stack(), stage, dtype, hift)
        for step in range(4):
            train_step(engine, step)
        engine.backward(loss_of(engine(data(4))))
        before = _held(engine)
        with OutOfMemory(nth) as memory:
            error = error_of(engine.step)
        if memory.left > 0:
            assert not error, error
            break
        after = _held(engine)
        if not error_of(lambda e=engine: e(data(5))):
            found[nth] = [name for name in before if not torch.equal(before[name], after[name])]
    return {nth: names for nth, names in found.items() if names}


def _held(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of this rank's weights, masters, moments and counts."""
    optimizer = engine.optimizer
    held = {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in engine.module.named_parameters()}
    for index, state in enumerate([*optimizer.states, *([optimizer.always] if optimizer.always else [])]):
        held |= {f"{index} {name}": tensor.clone() for name, tensor in state.tensors.items()}
        held[f"{index} step"] = torch.tensor(state.step)
    return held


def torn_and_loaded(folder: str) -> dict[str, Any]:
    """Stage 2: the new weights cannot be gathered, masters and moments have moved; a load goes on from the save."""
    engine = hift_engine(Stack(), 2, "bf16")
    oracle = TorchHiFT(Stack(), blocks_of(engine), "bf16")
    start = weights_of(oracle)
    for contestant in (engine, oracle):
        for step in range(4):
            train_step(contestant, step)
    engine.save_checkpoint(folder)
    nth = 0
    while not any(state.torn for state in engine.optimizer.states):
        nth += 1
        engine.backward(loss_of(engine(data(4))))
        with OutOfMemory(nth):
            assert error_of(engine.step).startswith("OutOfMemoryError")
        engine.zero_grad()
    refused = [error_of(lambda: train_step(engine, 4)), error_of(lambda: engine.save_checkpoint(folder))]
    engine.load_checkpoint(folder)
    for contestant in (engine, oracle):
        for step in range(4, 8):
            train_step(contestant, step)
    return {"refused": refused, "distance": distance(weights_of(engine), weights_of(oracle), start)}


def _fgsm(torch_style: bool) -> Callable[[Any, int], None]:
    def script(engine: Any, step: int) -> None:
        for micro in range(engine.gradient_accumulation_steps()):
            x = data(step, micro).requires_grad_()
            loss = loss_of(engine(x))
            if torch_style and not isinstance(engine, TorchHiFT):
                loss.backward()
            else:
                engine.backward(loss)
            attacked = (x + 0.1 * x.grad.sign()).detach()
            if micro == 0:
                engine.zero_grad()
            engine.backward(loss_of(engine(attacked)))
            engine.step()

    return script


def fgsm(stage: int, torch_style: bool) -> dict[str, Any]:
    """Adversarial training: a backward for the input's gradient alone, then the real one."""
    found = {}
    for way, hift in (("rotating", {}), ("one block", ONE_BLOCK)):
        engine = hift_engine(Stack(), stage, "fp32", hift)
        found[way] = beside_oracle(
            _fgsm(torch_style), engine, TorchHiFT(Stack(), blocks_of(engine)), 2 * len(engine.hift.blocks) + 1
        )
    oracle = TorchHiFT(Stack(), [[name for name, _ in Stack().named_parameters()]])
    found["plain"] = beside_oracle(_fgsm(torch_style), plain_engine(Stack(), stage), oracle, 3)
    return found


def gan(stage: int, toggle: bool, zero: bool, hift: dict[str, Any] | None) -> dict[str, Any]:
    """Two engines; the generator's loss goes backward through the discriminator.

    Args:
        toggle: The discriminator's parameters ask for no gradients during the generator's step, as many GANs do it.
        zero: The discriminator's gradients of the generator's step are dropped by `zero_grad`.
        hift: The section of both; None is plain DeepSpeed.
    """
    make = plain_engine if hift is None else lambda module, stage: hift_engine(module, stage, "fp32", hift)
    engines = [make(Stack(seed), stage) for seed in (1, 2)]
    every = [[name for name, _ in Stack().named_parameters()]]
    oracles = [TorchHiFT(Stack(seed), every if hift is None else blocks_of(engines[0])) for seed in (1, 2)]
    starts = [weights_of(oracle) for oracle in oracles]
    steps = 2 * len(oracles[0].blocks)
    error = error_of(lambda: [_gan_step(*engines, step, toggle, zero) for step in range(steps)])
    for step in range(steps):
        _gan_step(*oracles, step, False, True)
    found: dict[str, Any] = {"error": error}
    for name, engine, oracle, start in zip(("generator", "discriminator"), engines, oracles, starts, strict=True):
        found[name] = distance(weights_of(engine), weights_of(oracle), start)
        found[f"unmoved {name}"] = unmoved(weights_of(engine), start)
    return found


def _gan_step(generator: Any, discriminator: Any, step: int, toggle: bool, zero: bool) -> None:
    fake = generator(data(step, 1))
    if toggle:
        flags = [param.requires_grad for param in discriminator.module.parameters()]
        discriminator.module.requires_grad_(False)
    generator.backward(loss_of(discriminator(fake)))
    generator.step()
    if toggle:
        for param, flag in zip(discriminator.module.parameters(), flags, strict=True):
            param.requires_grad_(flag)
    if zero:
        discriminator.zero_grad()
    fake = generator(data(step, 2)).detach()
    discriminator.backward(loss_of(discriminator(data(step, 3))) + loss_of(-discriminator(fake)))
    discriminator.step()
