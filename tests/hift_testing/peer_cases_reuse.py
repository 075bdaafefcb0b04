"""Cases of the peers: a model that was, or is, another engine's."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from hift_testing.peer_cases import (
    HYPER,
    Holder,
    Stack,
    TorchHiFT,
    adamw,
    config_of,
    data,
    distance,
    error_of,
    fresh_copy,
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
from torch import nn

import hift_ds

CYCLE = 3  # blocks of a Stack


def _plain_loop(module: nn.Module, steps: int, start: int = 50) -> dict[str, torch.Tensor]:
    """A user's own torch loop, every parameter that asks for gradients; each rank trains alone."""
    optimizer = adamw([param for param in module.parameters() if param.requires_grad])
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(module(data(step))).backward()
        optimizer.step()
    return weights_of(Holder(module))


def _compared(engine: Any, other: Any, steps: int) -> dict[str, Any]:
    """Two engines on the same weights take the same steps."""
    start = weights_of(engine)
    assert all(torch.equal(weight, start[name]) for name, weight in weights_of(other).items())
    error = error_of(lambda: run(train_step, engine, steps, 20))
    run(train_step, other, steps, 20)
    weights, right = weights_of(engine), weights_of(other)
    assert not unmoved(right, start)
    return {"error": error, "distance": distance(weights, right, start), "unmoved": unmoved(weights, start)}


def engine_after_engine(
    stage: int, dtype: str, destroy: bool, first: str = "hift", second: str = "hift", steps_before: int = 4
) -> dict[str, Any]:
    """A second engine on a module that a first has trained, beside one on a fresh module with the same weights."""
    make: dict[str, Callable[[nn.Module], Any]] = {
        "hift": lambda module: hift_engine(module, stage, dtype),
        "plain": lambda module: plain_engine(module, stage, dtype),
    }
    module = Stack()
    old = make[first](module)
    run(train_step, old, steps_before)
    weights = weights_of(old)
    if destroy:
        old.destroy()
    new = make[second](module)
    other = make[second](fresh_copy(weights))
    found = _compared(new, other, 2 * CYCLE + 1)
    found["old"] = [
        error_of(lambda: old(data(1))),
        error_of(lambda: old.backward(loss_of(new(data(1))))),
        error_of(old.step),
    ]
    return found


def old_engine_leaves_the_new_one_alone(stage: int, dtype: str) -> dict[str, Any]:
    """Uses of the old engine between steps of the new one."""
    module = Stack()
    old = hift_engine(module, stage, dtype)
    run(train_step, old, 2)
    weights = weights_of(old)
    new, other = hift_engine(module, stage, dtype), hift_engine(fresh_copy(weights), stage, dtype)
    start, errors = weights_of(other), []
    for step in range(2 * CYCLE):
        errors += [error_of(lambda: old(data(1))), error_of(old.step)]
        train_step(new, step)
        train_step(other, step)
    return {"errors": errors, "distance": distance(weights_of(new), weights_of(other), start)}


def out_of_memory_then_again(stage: int, dtype: str) -> dict[str, Any]:
    """`auto_find_batch_size`: a step fails half way through backward, the caller starts anew on the same module."""
    module = Stack()
    old = hift_engine(module, stage, dtype)
    weights = weights_of(old)

    def fails(grad: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    output = old(data(0))
    output.register_hook(fails)
    error_of(lambda: old.backward(loss_of(output)))
    new = hift_engine(module, stage, dtype)
    return _compared(new, hift_engine(fresh_copy(weights), stage, dtype), 2 * CYCLE)


def destroyed(stage: int, dtype: str, first: str = "hift") -> dict[str, Any]:
    """What `destroy` leaves on a module with one frozen parameter and one hook of the user's own."""
    module = Stack()
    module.head.bias.requires_grad_(False)
    module.head.register_forward_hook(lambda *_: None)
    before = originals(module)
    engine = hift_engine(module, stage, dtype) if first == "hift" else plain_engine(module, stage, dtype)
    run(train_step, engine, 2)
    engine.destroy()
    after = originals(module)
    found = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    weights = weights_of(Holder(module))
    twin = fresh_copy(weights)
    twin.head.bias.requires_grad_(False)
    right, got = _plain_loop(twin, 3), _plain_loop(module, 3)
    return {"left": found, "distance": distance(got, right, weights), "unmoved": unmoved(got, weights)}


def deep_copy(stage: int, dtype: str, destroy: bool) -> dict[str, Any]:
    """A copy of an engine's module has the user's flags and trains alone; the engine does not notice."""
    module = Stack()
    module.head.bias.requires_grad_(False)
    flags = originals(module)["requires_grad"]
    engine = hift_engine(module, stage, dtype)
    oracle = hift_engine(_frozen_bias(fresh_copy(weights_of(engine))), stage, dtype)
    run(train_step, engine, 2)
    run(train_step, oracle, 2)
    if destroy:
        engine.destroy()
    weights = weights_of(engine)
    duplicate = copy.deepcopy(engine.module)
    found: dict[str, Any] = {"flags": originals(duplicate)["requires_grad"] == flags}
    right = _plain_loop(_frozen_bias(fresh_copy(weights)), 3)
    got = _plain_loop(duplicate, 3)
    found.update(distance=distance(got, right, weights), unmoved=unmoved(got, weights))
    found["engine"] = 0.0
    if not destroy:
        run(train_step, engine, CYCLE, 2)
        run(train_step, oracle, CYCLE, 2)
        found["engine"] = distance(weights_of(engine), weights_of(oracle), weights)
    return found


def _frozen_bias(module: nn.Module) -> nn.Module:
    module.head.bias.requires_grad_(False)
    return module


BAD: dict[str, dict[str, Any]] = {
    "unknown key": {"hift": {"layer_per_block": 2}},
    "frozen matches nothing": {"hift": {"frozen": ["nowhere"]}},
    "everything frozen": {"hift": {"frozen": ["."]}},
    "blocks that leave parameters out": {"hift": {"blocks": [["head"], ["layers.0"]]}},
    "optimizer parameter": {"optimizer": {"type": "AdamW", "params": {"learning_rate": 1e-3}}},
    "optimizer type": {"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}},
    "optimizer value": {"optimizer": {"type": "AdamW", "params": {**HYPER, "lr": -1.0}}},
    "scheduler type": {"scheduler": {"type": "NoSuchLR", "params": {}}},
    "refused key": {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "x"}}},
}


def _bad_config(name: str, stage: int, dtype: str) -> dict[str, Any]:
    keys = copy.deepcopy(BAD[name])
    return config_of(stage, dtype, {"frozen": ["head.bias"], **keys.pop("hift", {})}, **keys)


def refused_initialize(stage: int, dtype: str) -> dict[str, Any]:
    """Each bad config on a module of its own: what it left there, and whether the module then trains as a fresh one."""
    found = {}
    for name in BAD:
        module = Stack()
        before = originals(module)
        error = error_of(lambda m=module, n=name: hift_ds.initialize(model=m, config=_bad_config(n, stage, dtype)))
        after = originals(module)
        left = {key: (before[key], after[key]) for key in ("requires_grad", "hooks", "hooks of parameters")}
        facts = {"error": error, "left": {key: pair for key, pair in left.items() if pair[0] != pair[1]}}
        good = hift_engine(module, stage, dtype)
        facts.update(then=_compared(good, hift_engine(fresh_copy(weights_of(good)), stage, dtype), CYCLE + 1))
        found[name] = facts
    return found


def refused_beside_a_living_engine(stage: int, dtype: str) -> dict[str, Any]:
    """Bad configs on the module of an engine that goes on training."""
    module, found = Stack(), {}
    engine = hift_engine(module, stage, dtype)
    other = hift_engine(fresh_copy(weights_of(engine)), stage, dtype)
    start = weights_of(other)
    for step, name in enumerate(BAD):
        found[name] = error_of(lambda n=name: hift_ds.initialize(model=module, config=_bad_config(n, stage, dtype)))
        error = error_of(lambda s=step: train_step(engine, s))
        train_step(other, step)
        far = distance(weights_of(engine), weights_of(other), start)
        if error or far > 0.1:
            return {"errors": found, "after": name, "error": error, "distance": far}
    far = distance(weights_of(engine), weights_of(other), start)
    return {"errors": found, "after": "", "error": "", "distance": far}


def memory_after_destroy(stage: int, dtype: str, first: str = "hift") -> dict[str, Any]:
    """Bytes of all tensors that python knows, beyond what was there before, once the engine is gone."""
    gc.collect()
    before = _tensor_bytes()
    module = Stack(width=256)
    engine = hift_engine(module, stage, dtype) if first == "hift" else plain_engine(module, stage, dtype)
    for step in range(CYCLE):
        engine.backward(loss_of(engine(data(step, width=256))))
        engine.step()
    alive = [weakref.ref(engine), weakref.ref(engine.optimizer)]
    within = _tensor_bytes() - before
    engine.destroy()
    del engine
    numel = sum(getattr(param, "ds_numel", param.numel()) for param in module.parameters())
    own = numel * (4 if dtype == "fp32" else 2)
    found = {"within": within / numel, "after": (_tensor_bytes_once_at(before + own) - before) / numel}
    found["alive"] = [ref() is not None for ref in alive]
    del module
    found["without the module"] = (_tensor_bytes_once_at(before) - before) / numel
    return found


def _tensor_bytes_once_at(most: int) -> int:
    """At the latest after 5 s: gloo's threads hold a collective's tensors a moment longer."""
    until = time.monotonic() + 5
    while True:
        gc.collect()
        present = _tensor_bytes()
        if present <= most or time.monotonic() > until:
            return present
        time.sleep(0.1)


def _tensor_bytes() -> int:
    sizes = {}
    for thing in gc.get_objects():
        try:
            if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                sizes[storage.data_ptr()] = max(storage.nbytes(), sizes.get(storage.data_ptr(), 0))
        except (RuntimeError, ReferenceError, NotImplementedError):  # fake tensors, dead proxies
            continue
    return sum(sizes.values())


def two_engines_in_turn(stage: int, dtype: str, other: str) -> dict[str, Any]:
    """Two models of one process, steps in turn; the second is HiFT's too, or plain DeepSpeed's."""
    first = hift_engine(Stack(0), stage, dtype)
    alone = hift_engine(Stack(0), stage, dtype)
    start = weights_of(first)
    run(train_step, alone, 2 * CYCLE)
    second = hift_engine(Stack(1), stage, dtype) if other == "hift" else plain_engine(Stack(1), stage, dtype)
    oracle = TorchHiFT(Stack(1), [[n for n, _ in Stack(1).named_parameters()]], dtype) if other == "plain" else None
    start_of_second = weights_of(second)
    for step in range(2 * CYCLE):
        left, right = first(data(step)), second(data(step, 7))
        second.backward(loss_of(right))
        first.backward(loss_of(left))
        first.step()
        second.step()
        if oracle is not None:
            oracle.backward(loss_of(oracle(data(step, 7))))
            oracle.step()
    found = {"first": distance(weights_of(first), weights_of(alone), start)}
    found["unmoved"] = unmoved(weights_of(second), start_of_second)
    found["second"] = distance(weights_of(second), weights_of(oracle), start_of_second) if oracle else 0.0
    dist.barrier()
    return found


def fails_in_the_build(stage: int) -> dict[str, Any]:
    """All checks pass, then a user's optimizer factory raises; with a frozen layer."""
    module = Stack()
    before = originals(module)

    def factory(params: Any) -> Any:
        raise RuntimeError("no optimizer today")

    config = config_of(stage, "fp32", {"frozen": [r"layers\.0"]})
    del config["optimizer"]
    error = error_of(lambda: hift_ds.initialize(model=module, config=config, optimizer=factory))
    after = originals(module)
    kept = ("requires_grad", "hooks") if stage < 3 else ("requires_grad",)
    return {"error": error, "left": [name for name in kept if before[name] != after[name]]}


def refused_within_a_window(stage: int, folder: str) -> dict[str, Any]:
    """A bad config between each backward and step of a module's second engine; then all flags on, a save and a load."""
    module, frozen = Stack(), {"frozen": [r"layers\.0"]}
    hift_engine(module, stage, hift=frozen).destroy()
    engine = hift_engine(module, stage, hift=frozen, gas=2)
    other = hift_engine(fresh_copy(weights_of(engine)), stage, hift=frozen, gas=2)
    start = weights_of(other)
    wrong = config_of(stage, "fp32", {"order": "sideways"})
    for step in range(CYCLE):
        for micro in range(2):
            for contestant in (engine, other):
                if micro == 0:
                    contestant.backward(loss_of(contestant(data(step, 7))))
                    contestant.module.zero_grad()  # what is put on the module stays there, too
                contestant.backward(loss_of(contestant(data(step, micro))))
            refused = error_of(lambda: hift_ds.initialize(model=module, config=wrong))
            engine.step()
            other.step()
    flags = [param.requires_grad for param in module.layers[0].parameters()]
    far = distance(weights_of(engine), weights_of(other), start)
    module.requires_grad_(True)
    engine.save_checkpoint(folder)
    dist.barrier()
    loaded = hift_engine(Stack(1), stage, hift=frozen, gas=2)
    loaded.load_checkpoint(folder)
    missed = distance(weights_of(loaded), weights_of(engine), weights_of(engine))
    return {"refused": refused, "distance": far, "flags": flags, "loaded": missed}


def after_inference(stage: int, folder: str) -> dict[str, str]:
    """What follows a forward under inference mode, which at stage 3 leaves parameters of its kind."""
    module = Stack()
    engine = hift_engine(module, stage)
    found = {}

    def ask() -> None:
        with torch.inference_mode():
            engine(data(0))

    train_step(engine, 0)
    ask()
    wrong = config_of(stage, "fp32", {"order": "sideways"})
    found["refused"] = error_of(lambda: hift_ds.initialize(model=module, config=wrong))
    found["goes on"] = error_of(lambda: run(train_step, engine, CYCLE))
    for name in ("save_checkpoint", "load_checkpoint"):
        ask()
        found[name] = error_of(lambda n=name: getattr(engine, n)(folder))
        dist.barrier()
    ask()
    found["module_state_dict"] = error_of(lambda: engine.module_state_dict(exclude_frozen_parameters=True))
    ask()
    engine = hift_engine(module, stage)
    found["taken over"] = error_of(lambda: run(train_step, engine, CYCLE))
    ask()
    engine.destroy()
    engine = hift_engine(module, stage)
    found["destroyed"] = error_of(lambda: run(train_step, engine, CYCLE))
    return found


def ended(stage: int, folder: str) -> dict[str, Any]:
    """What is asked of an engine that another one has followed, after it has saved a checkpoint."""
    module = Stack()
    engine = hift_engine(module, stage)
    run(train_step, engine, 2)
    optimizer = engine.optimizer
    engine.save_checkpoint(folder, tag="good")
    dist.barrier()
    saved = {path.name: path.read_bytes() for path in Path(folder, "good").iterdir()}
    second = hift_engine(module, stage)
    flags = [param.requires_grad for param in module.parameters()]
    asked = {
        "forward": lambda: engine(data(0)),
        "step": engine.step,
        "optimizer.step": optimizer.step,
        "save": lambda: engine.save_checkpoint(folder, tag="good"),
        "save weights": lambda: engine.save_16bit_model(folder),
        "load": lambda: engine.load_checkpoint(folder, tag="good"),
    }
    errors = {name: error_of(ask) for name, ask in asked.items()}
    dist.barrier()
    kept = saved == {path.name: path.read_bytes() for path in Path(folder, "good").iterdir()}
    same = flags == [param.requires_grad for param in module.parameters()]
    return {"errors": errors, "kept": kept, "flags": same, "goes on": error_of(lambda: run(train_step, second, CYCLE))}


def backward_without_the_engine(stage: int) -> list[str]:
    """A torch loop on the module of a living engine, twice: what it reads; before that the engine's own loops."""
    module = Stack()
    engine = hift_engine(module, stage)
    with messages() as read:
        train_step(engine, 0)
        loss_of(engine(data(1))).backward()
        engine.step()
        engine.backward(loss_of(module(data(2))))
        engine.step()
        before = len(read)
        for step in (3, 4):
            loss_of(module(data(step))).backward()
    return [text for text in read[before:] if "backward came through" in text] + read[:before]
