"""A model outlives its engine: whatever trains it next finds it as it was found, or takes it over whole."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from hift_testing.contestants import (
    BOUNDS,
    HYPER,
    Stack,
    TorchHiFT,
    adamw,
    assert_near,
    config_of,
    data,
    distance,
    hift_engine,
    loss_of,
    moved,
    on,
    originals,
    plain_engine,
    run,
    train_step,
    unmoved,
)
from hift_testing.messages import error_of, is_clear, messages
from hift_testing.selection import slow
from hift_testing.training import largest_difference, whole_weights
from torch import nn

import hift_ds

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)
WHOLE = (0, 1, 2)  # stages at which weights stay ordinary tensors


def fresh_copy(weights: dict[str, torch.Tensor]) -> Stack:
    """A module that no engine has seen, with these weights."""
    module = Stack()
    with torch.no_grad():
        for name, param in module.named_parameters():
            param.data = weights[name].clone()
    return module


CYCLE = 3  # blocks of a Stack
ENGINES = {"hift": hift_engine, "plain": plain_engine}


def train_alike(engine: Any, other: Any, steps: int, dtype: str = "fp32") -> None:
    """Two engines on the same weights take the same steps."""
    start = whole_weights(engine)
    assert not moved(whole_weights(other), start), "both must start alike"
    run(train_step, steps, engine, other, start=20)
    weights, right = whole_weights(engine), whole_weights(other)
    assert not unmoved(right, start) and not unmoved(weights, start)
    assert distance(weights, right, start) <= BOUNDS[dtype]


def engine_after_engine(stage: int, dtype: str, destroy: bool, first: str = "hift", second: str = "hift") -> None:
    """A second engine on a module that a first has trained, beside one on a fresh module with the same weights."""
    module = Stack()
    old = ENGINES[first](module, stage, dtype)
    run(train_step, 4, old)
    weights = whole_weights(old)
    if destroy:
        old.destroy()
    new = ENGINES[second](module, stage, dtype)
    other = ENGINES[second](fresh_copy(weights), stage, dtype)
    train_alike(new, other, 2 * CYCLE + 1, dtype)
    if first == second == "hift":
        for ask in (lambda: old(data(1)), lambda: old.backward(loss_of(new(data(1)))), old.step):
            refuses(ask)


def refuses(ask: Callable[[], Any]) -> None:
    error = error_of(ask)
    assert error.startswith("RuntimeError") and is_clear(error), error


@pytest.mark.parametrize(
    ("stage", "destroy"),
    [(0, True), (3, False), *map(slow, (0, 1, 1, 2, 2, 3), (False, False, True, False, True, True))],
)
def test_a_second_engine_trains_the_module_as_a_fresh_one(ranks, stage, destroy):
    on(ranks, engine_after_engine, stage, "fp32", destroy)


@pytest.mark.slow
@pytest.mark.parametrize("destroy", (False, True), ids=("living", "destroyed"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_second_engine_in_bf16_trains_the_module_as_a_fresh_one(ranks, stage, destroy):
    on(ranks, engine_after_engine, stage, "bf16", destroy)


@pytest.mark.parametrize("stage", [0, slow(1), slow(2), 3])
def test_a_plain_engine_after_destroy_trains_the_module_as_a_fresh_one(ranks, stage):
    on(ranks, engine_after_engine, stage, "fp32", True, second="plain")


@pytest.mark.parametrize("stage", STAGES)
def test_hift_after_a_destroyed_plain_engine_trains_the_module_as_a_fresh_one(ranks, stage):
    on(ranks, engine_after_engine, stage, "fp32", True, first="plain")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_plain_after_plain_is_the_reference(ranks, stage):
    on(ranks, engine_after_engine, stage, "fp32", True, "plain", "plain")


def old_engine_leaves_the_new_one_alone(stage: int, dtype: str) -> None:
    """Uses of the old engine between steps of the new one."""
    module = Stack()
    old = hift_engine(module, stage, dtype)
    run(train_step, 2, old)
    weights = whole_weights(old)
    new, other = hift_engine(module, stage, dtype), hift_engine(fresh_copy(weights), stage, dtype)
    start = whole_weights(other)
    for step in range(2 * CYCLE):
        refuses(lambda: old(data(1)))
        refuses(old.step)
        train_step(new, step)
        train_step(other, step)
    assert_near(new, other, dtype, start=start)


@pytest.mark.parametrize("stage", STAGES)
def test_a_replaced_engine_refuses_and_disturbs_nothing(ranks, stage):
    on(ranks, old_engine_leaves_the_new_one_alone, stage, "fp32")


def out_of_memory_then_again(stage: int, dtype: str) -> None:
    """`auto_find_batch_size`: a step fails half way through backward, the caller starts anew on the same module."""
    module = Stack()
    old = hift_engine(module, stage, dtype)
    weights = whole_weights(old)

    def fails(grad: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    output = old(data(0))
    output.register_hook(fails)
    error_of(lambda: old.backward(loss_of(output)))
    new = hift_engine(module, stage, dtype)
    train_alike(new, hift_engine(fresh_copy(weights), stage, dtype), 2 * CYCLE, dtype)


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_after_a_backward_that_failed_trains_as_a_fresh_one(ranks, stage):
    on(ranks, out_of_memory_then_again, stage, "fp32")


def plain_loop(module: nn.Module, steps: int, start: int = 50) -> dict[str, torch.Tensor]:
    """A user's own torch loop, every parameter that asks for gradients; each rank trains alone."""
    optimizer = adamw([param for param in module.parameters() if param.requires_grad])
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(module(data(step))).backward()
        optimizer.step()
    return weights_alone(module)


def weights_alone(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights of a module that no engine holds."""
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def frozen_bias(module: nn.Module) -> nn.Module:
    module.head.bias.requires_grad_(False)
    return module


def destroyed(stage: int, dtype: str) -> None:
    """What `destroy` leaves on a module with one frozen parameter and one hook of the user's own."""
    module = frozen_bias(Stack())
    module.head.register_forward_hook(lambda *_: None)
    before = originals(module)
    engine = hift_engine(module, stage, dtype)
    run(train_step, 2, engine)
    engine.destroy()
    assert originals(module) == before
    weights = weights_alone(module)
    right, got = plain_loop(frozen_bias(fresh_copy(weights)), 3), plain_loop(module, 3)
    assert unmoved(got, weights) == ["head.bias"]
    assert distance(got, right, weights) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", WHOLE)
def test_destroy_leaves_the_module_as_it_was_found(ranks, stage, dtype):
    on(ranks, destroyed, stage, dtype)


def deep_copy(stage: int, dtype: str, destroy: bool) -> None:
    """A copy of an engine's module has the user's flags and trains alone; the engine does not notice."""
    module = frozen_bias(Stack())
    flags = originals(module)["requires_grad"]
    engine = hift_engine(module, stage, dtype)
    oracle = hift_engine(frozen_bias(fresh_copy(whole_weights(engine))), stage, dtype)
    run(train_step, 2, engine, oracle)
    if destroy:
        engine.destroy()
    weights = whole_weights(engine)
    duplicate = copy.deepcopy(engine.module)
    assert originals(duplicate)["requires_grad"] == flags
    right, got = plain_loop(frozen_bias(fresh_copy(weights)), 3), plain_loop(duplicate, 3)
    assert unmoved(got, weights) == ["head.bias"]
    assert distance(got, right, weights) <= BOUNDS[dtype]
    if not destroy:
        run(train_step, CYCLE, engine, oracle, start=2)
        assert_near(engine, oracle, dtype, start=weights)


@pytest.mark.parametrize("destroy", (False, True), ids=("living", "destroyed"))
@pytest.mark.parametrize("stage", WHOLE)
def test_a_deep_copy_of_the_module_has_the_users_flags_and_trains_alone(ranks, stage, destroy):
    on(ranks, deep_copy, stage, "fp32", destroy)


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


def bad_config(name: str, stage: int, dtype: str) -> dict[str, Any]:
    keys = copy.deepcopy(BAD[name])
    return config_of(stage, dtype, {"frozen": ["head.bias"], **keys.pop("hift", {})}, **keys)


def refused_initialize(stage: int, dtype: str) -> list[str]:
    """Errors of bad configs, each on a module of its own, which is left as it was and then trains as a fresh one."""
    errors = []
    for name in BAD:
        module = Stack()
        before = originals(module)
        error = error_of(lambda m=module, n=name: hift_ds.initialize(model=m, config=bad_config(n, stage, dtype)))
        assert is_clear(error), (name, error)
        after = originals(module)
        for key in ("requires_grad", "hooks", "hooks of parameters"):
            assert after[key] == before[key], (name, key)
        good = hift_engine(module, stage, dtype)
        train_alike(good, hift_engine(fresh_copy(whole_weights(good)), stage, dtype), CYCLE + 1, dtype)
        errors.append(error)
    return errors


@pytest.mark.parametrize("stage", STAGES)
def test_a_refused_initialize_leaves_the_module_as_it_was_found(ranks, stage):
    errors, *others = on(ranks, refused_initialize, stage, "fp32")
    assert all(other == errors for other in others)


def refused_beside_a_living_engine(stage: int, dtype: str) -> None:
    """Bad configs on the module of an engine that goes on training."""
    module = Stack()
    engine = hift_engine(module, stage, dtype)
    other = hift_engine(fresh_copy(whole_weights(engine)), stage, dtype)
    start = whole_weights(other)
    for step, name in enumerate(BAD):
        assert error_of(lambda n=name: hift_ds.initialize(model=module, config=bad_config(n, stage, dtype))), name
        train_step(engine, step)
        train_step(other, step)
        assert_near(engine, other, dtype, start=start)


@pytest.mark.parametrize("stage", STAGES)
def test_a_refused_initialize_does_not_disturb_the_engine_that_trains_the_module(ranks, stage):
    on(ranks, refused_beside_a_living_engine, stage, "fp32")


def tensor_bytes() -> int:
    sizes = {}
    for thing in gc.get_objects():
        try:
            if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                sizes[storage.data_ptr()] = max(storage.nbytes(), sizes.get(storage.data_ptr(), 0))
        except (RuntimeError, ReferenceError, NotImplementedError):  # fake tensors, dead proxies
            continue
    return sum(sizes.values())


def tensor_bytes_once_at(most: int) -> int:
    """At the latest after 5 s: gloo's threads hold a collective's tensors a moment longer."""
    until = time.monotonic() + 5
    while True:
        gc.collect()
        present = tensor_bytes()
        if present <= most or time.monotonic() > until:
            return present
        time.sleep(0.1)


def memory_after_destroy(stage: int, dtype: str) -> None:
    """Bytes a parameter of all tensors that python knows, beyond what was there before, once the engine is gone."""
    gc.collect()
    before = tensor_bytes()
    module = Stack(width=256)
    engine = hift_engine(module, stage, dtype)
    for step in range(CYCLE):
        engine.backward(loss_of(engine(data(step, width=256))))
        engine.step()
    within = tensor_bytes() - before
    engine.destroy()
    del engine
    numel = sum(getattr(param, "ds_numel", param.numel()) for param in module.parameters())
    own = 4 if dtype == "fp32" else 2
    after = tensor_bytes_once_at(before + own * numel) - before
    assert within > after + 3 * numel, "the count must see an engine's state"
    assert after < (own + 0.5) * numel, after / numel  # the module's own
    del module
    assert tensor_bytes_once_at(before) - before < 0.5 * numel


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_destroyed_engine_leaves_no_state_in_memory(ranks, stage, dtype):
    on(ranks, memory_after_destroy, stage, dtype)


def two_engines_in_turn(stage: int, dtype: str, other: str) -> None:
    """Two models of one process, steps in turn; the second is HiFT's too, or plain DeepSpeed's."""
    first = hift_engine(Stack(0), stage, dtype)
    alone = hift_engine(Stack(0), stage, dtype)
    start = whole_weights(first)
    run(train_step, 2 * CYCLE, alone)
    second = ENGINES[other](Stack(1), stage, dtype)
    oracle = TorchHiFT(Stack(1), [[n for n, _ in Stack(1).named_parameters()]], dtype) if other == "plain" else None
    start_of_second = whole_weights(second)
    for step in range(2 * CYCLE):
        left, right = first(data(step)), second(data(step, 7))
        second.backward(loss_of(right))
        first.backward(loss_of(left))
        first.step()
        second.step()
        if oracle is not None:
            oracle.backward(loss_of(oracle(data(step, 7))))
            oracle.step()
    assert not unmoved(whole_weights(second), start_of_second)
    assert_near(first, alone, dtype, start=start)
    if oracle is not None:
        assert_near(second, oracle, dtype)


@pytest.mark.parametrize("other", ("hift", "plain"))
@pytest.mark.parametrize("stage", STAGES)
def test_two_engines_of_one_process_train_as_each_alone(ranks, stage, other):
    on(ranks, two_engines_in_turn, stage, "fp32", other)


def fails_in_the_build(stage: int) -> None:
    """All checks pass, then a user's optimizer factory raises; with a frozen layer."""
    module = Stack()
    before = originals(module)

    def factory(params: Any) -> Any:
        raise RuntimeError("no optimizer today")

    config = config_of(stage, "fp32", {"frozen": [r"layers\.0"]})
    del config["optimizer"]
    error = error_of(lambda: hift_ds.initialize(model=module, config=config, optimizer=factory))
    assert "no optimizer today" in error
    after = originals(module)
    for key in ("requires_grad", "hooks") if stage < 3 else ("requires_grad",):
        assert after[key] == before[key]


@pytest.mark.parametrize("stage", STAGES)
def test_an_initialize_that_fails_after_all_checks_leaves_flags_and_hooks_as_found(ranks, stage):
    on(ranks, fails_in_the_build, stage)


def refused_within_a_window(stage: int, folder: str) -> None:
    """A bad config between each backward and step of a module's second engine; then all flags on, a save and a load."""
    module, frozen = Stack(), {"frozen": [r"layers\.0"]}
    hift_engine(module, stage, hift=frozen).destroy()
    engine = hift_engine(module, stage, hift=frozen, gas=2)
    other = hift_engine(fresh_copy(whole_weights(engine)), stage, hift=frozen, gas=2)
    start = whole_weights(other)
    wrong = config_of(stage, "fp32", {"order": "sideways"})
    for step in range(CYCLE):
        for micro in range(2):
            for contestant in (engine, other):
                if micro == 0:
                    contestant.backward(loss_of(contestant(data(step, 7))))
                    contestant.module.zero_grad()  # what is put on the module stays there, too
                contestant.backward(loss_of(contestant(data(step, micro))))
            assert "hift.order" in error_of(lambda: hift_ds.initialize(model=module, config=wrong))
            engine.step()
            other.step()
    assert not any(param.requires_grad for param in module.layers[0].parameters())
    assert_near(engine, other, start=start)
    module.requires_grad_(True)
    engine.save_checkpoint(folder)
    dist.barrier()
    loaded = hift_engine(Stack(1), stage, hift=frozen, gas=2)
    loaded.load_checkpoint(folder)
    assert largest_difference(whole_weights(loaded), whole_weights(engine)) == 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_a_refused_initialize_within_a_window_leaves_its_gradients_and_what_is_frozen(ranks, stage, tmp_path):
    on(ranks, refused_within_a_window, stage, str(tmp_path))


def ended(stage: int, folder: str) -> None:
    """What is asked of an engine that another one has followed, after it has saved a checkpoint."""
    module = Stack()
    engine = hift_engine(module, stage)
    run(train_step, 2, engine)
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
    for name, ask in asked.items():
        assert error_of(ask).startswith("RuntimeError: this engine has ended"), name
    dist.barrier()
    assert saved == {path.name: path.read_bytes() for path in Path(folder, "good").iterdir()}
    assert flags == [param.requires_grad for param in module.parameters()]
    run(train_step, CYCLE, second)


@pytest.mark.parametrize("stage", STAGES)
def test_an_ended_engine_refuses_everything_and_writes_over_no_checkpoint(ranks, stage, tmp_path):
    on(ranks, ended, stage, str(tmp_path))


def backward_without_the_engine(stage: int) -> None:
    """A torch loop on the module of a living engine, twice: what it reads; before that the engine's own loops."""
    module = Stack()
    engine = hift_engine(module, stage)
    with messages() as read:
        train_step(engine, 0)
        loss_of(engine(data(1))).backward()
        engine.step()
        engine.backward(loss_of(module(data(2))))
        engine.step()
        before = list(read)
        for step in (3, 4):
            loss_of(module(data(step))).backward()
    assert not before
    (warning,) = [text for text in read if "backward came through" in text]
    assert "end the engine with engine.destroy()" in warning


@pytest.mark.parametrize("stage", STAGES[:3])
def test_a_backward_that_the_engine_has_not_begun_is_warned_of_once(one_rank, stage):
    on(one_rank, backward_without_the_engine, stage)


def after_inference(stage: int, folder: str) -> None:
    """What follows a forward under inference mode, which at stage 3 leaves parameters of its kind."""
    module = Stack()
    engine = hift_engine(module, stage)

    def ask() -> None:
        with torch.inference_mode():
            engine(data(0))

    train_step(engine, 0)
    ask()
    wrong = config_of(stage, "fp32", {"order": "sideways"})
    assert "hift.order" in error_of(lambda: hift_ds.initialize(model=module, config=wrong))
    run(train_step, CYCLE, engine)
    for act in (engine.save_checkpoint, engine.load_checkpoint):
        ask()
        act(folder)
        dist.barrier()
    ask()
    engine.module_state_dict(exclude_frozen_parameters=True)
    ask()
    engine = hift_engine(module, stage)
    run(train_step, CYCLE, engine)
    ask()
    engine.destroy()
    run(train_step, CYCLE, hift_engine(module, stage))


@pytest.mark.parametrize("stage", (0, 3))
def test_after_a_forward_under_inference_mode_an_engine_saves_loads_and_ends_as_ever(ranks, stage, tmp_path):
    on(ranks, after_inference, stage, str(tmp_path))
