"""Gradients that the user has dropped, or asked for other ends, are in no update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from hift_testing.contestants import (
    ONE_BLOCK,
    Stack,
    TorchHiFT,
    adamw,
    assert_beside_oracle,
    assert_near,
    beside_oracle,
    blocks_of,
    config_of,
    data,
    faults,
    hift_engine,
    loss_of,
    moved,
    on,
    pair,
    run,
    shards_of,
    train_step,
    unmoved,
)
from hift_testing.disturbed import Fused, OutOfMemory
from hift_testing.fingerprints import weights_by_name
from hift_testing.messages import error_of
from hift_testing.training import whole_weights

import hift_ds

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)


class Contestant:
    """An engine and the object whose `zero_grad` a script calls."""

    def __init__(self, engine: Any, zero: Callable[[], None]) -> None:
        self.engine, self.zero_grad, self.module = engine, zero, engine.module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, *args: Any) -> Any:
        return self.engine(*args)


def bad(engine: Any, step: int) -> None:
    engine.backward(1e3 * loss_of(engine(data(step, 7))))


def bad_batch_first(engine: Any, step: int) -> None:
    """A bad batch is noticed after backward and before step."""
    bad(engine, step)
    engine.zero_grad()
    train_step(engine, step)


def bad_batch_in_the_window(engine: Any, step: int) -> None:
    """The bad batch comes after a good one, which goes with it; the window then starts anew."""
    engine.backward(loss_of(engine(data(step, 8))))
    bad(engine, step)
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


def dropped(name: str, by: str, stage: int, dtype: str = "fp32", gas: int = 1) -> None:
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
    assert not faults(found, dtype)


@pytest.mark.parametrize("by", ("engine", "optimizer", "client", "module"))
@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_drops_what_was_computed(ranks, stage, gas, by):
    on(ranks, dropped, "bad_batch_first", by, stage, gas=gas)


@pytest.mark.slow
@pytest.mark.parametrize("by", ("engine", "optimizer", "client"))
@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "bad_batch_first"])
def test_zero_grad_drops_what_was_computed_and_nothing_else(ranks, name, stage, gas, by):
    on(ranks, dropped, name, by, stage, gas=gas)


@pytest.mark.slow
@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_drops_what_was_computed_in_bf16(ranks, stage, gas):
    on(ranks, dropped, "bad_batch_first", "engine", stage, "bf16", gas)


def failing_backwards(stage: int, where: int, hift: dict[str, Any], gas: int = 1, torch_style: bool = False) -> None:
    """Each window's backward fails once on every rank, is caught, `zero_grad`, and the window comes again."""
    engine, oracle = pair(lambda: Fused(where), stage, "fp32", hift, gas)
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

    # With the active block above the fuse, backward never comes to it.
    assert_beside_oracle(script, engine, oracle)
    assert any("out of memory" in error for error in raised), "the case must fail as planned"


@pytest.mark.parametrize("hift", ({}, ONE_BLOCK), ids=("rotating", "one block"))
@pytest.mark.parametrize("gas", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_that_failed_leaves_nothing_behind(ranks, stage, gas, hift):
    on(ranks, failing_backwards, stage, 1, hift, gas)


def failing_second_micro_step(stage: int, zeroes: bool) -> None:
    """With accumulation, a backward fails where half of a window is there; the oracle never sees that window."""
    engine, oracle = pair(lambda: Fused(2), stage, "fp32", {}, 2)
    module = engine.module
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

    assert_beside_oracle(script, engine, oracle)
    assert all("out of memory" in error for error in raised), "the case must fail as planned"


@pytest.mark.parametrize("zeroes", (False, True), ids=("goes on", "zero_grad"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_that_failed_ends_its_window_and_the_next_one_is_whole(ranks, stage, zeroes):
    on(ranks, failing_second_micro_step, stage, zeroes)


def one_rank_fails(stage: int, zeroes: bool) -> dict[str, str]:
    """The backward of one micro step fails on rank 0 alone, which steps all the same: its part is missing, no more."""
    module = Fused(2)
    engine = hift_engine(module, stage, "fp32", ONE_BLOCK, 3)
    start = whole_weights(engine)
    for step in range(3):
        for micro in range(3):
            module.switch[0] = fails = (dist.get_rank(), step, micro) == (0, 1, 1)
            error = error_of(lambda s=step, m=micro: engine.backward(loss_of(engine(data(s, m)))))
            assert ("out of memory" in error) == fails and bool(error) == fails
            if fails and zeroes:
                engine.zero_grad()
            engine.step()
    assert engine.global_steps == 3
    assert unmoved(whole_weights(engine), start) == []
    return weights_by_name(engine)


@pytest.mark.parametrize("zeroes", (False, True), ids=("goes on", "zero_grad"))
@pytest.mark.parametrize("stage", (0, 1))
def test_a_rank_whose_backward_failed_and_that_steps_stays_in_step_with_the_others(two_ranks, stage, zeroes):
    first, second = on(two_ranks, one_rank_fails, stage, zeroes)
    assert first == second


def step_after_a_failed_backward(stage: int, torch_style: bool) -> None:
    """The backward fails half way, is caught, and the user steps all the same; then trains on."""
    module = Fused(1)
    engine = hift_engine(module, stage, "fp32", ONE_BLOCK)
    start = whole_weights(engine)
    module.switch[0] = True
    loss = loss_of(engine(data(0)))
    assert "out of memory" in error_of(loss.backward if torch_style else lambda: engine.backward(loss))
    module.switch[0] = False
    assert error_of(engine.step).startswith("RuntimeError: the last backward ended with an error")
    assert moved(whole_weights(engine), start) == []
    twin = hift_engine(Fused(1), stage, "fp32", ONE_BLOCK)
    run(train_step, 2, engine, twin, start=1)
    assert_near(engine, twin, start=start)


@pytest.mark.parametrize("torch_style", (False, True), ids=("engine.backward", "loss.backward"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_after_a_backward_that_failed_is_an_error_and_no_half_update(ranks, stage, torch_style):
    on(ranks, step_after_a_failed_backward, stage, torch_style)


@pytest.mark.slow
@pytest.mark.parametrize("where", (0, 2))
@pytest.mark.parametrize("stage", (1, 2, 3))
def test_a_torch_style_backward_that_failed_leaves_nothing_behind(ranks, stage, where):
    on(ranks, failing_backwards, stage, where, {}, torch_style=True)


def fgsm_script(torch_style: bool) -> Callable[[Any, int], None]:
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


def fgsm(stage: int, torch_style: bool) -> None:
    """Adversarial training: a backward for the input's gradient alone, then the real one."""
    for hift in ({}, ONE_BLOCK):
        engine = hift_engine(Stack(), stage, "fp32", hift)
        assert_beside_oracle(fgsm_script(torch_style), engine, TorchHiFT(Stack(), blocks_of(engine)))


@pytest.mark.parametrize("torch_style", (False, True), ids=("engine.backward", "loss.backward"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_for_the_inputs_is_not_in_the_update(ranks, stage, torch_style):
    on(ranks, fgsm, stage, torch_style)


def gan_step(generator: Any, discriminator: Any, step: int, toggle: bool) -> None:
    fake = generator(data(step, 1))
    if toggle:
        flags = [param.requires_grad for param in discriminator.module.parameters()]
        discriminator.module.requires_grad_(False)
    generator.backward(loss_of(discriminator(fake)))
    generator.step()
    if toggle:
        for param, flag in zip(discriminator.module.parameters(), flags, strict=True):
            param.requires_grad_(flag)
    discriminator.zero_grad()
    fake = generator(data(step, 2)).detach()
    discriminator.backward(loss_of(discriminator(data(step, 3))) + loss_of(-discriminator(fake)))
    discriminator.step()


def gan(stage: int, toggle: bool, hift: dict[str, Any]) -> None:
    """Two engines; the generator's loss goes backward through the discriminator.

    Args:
        toggle: The discriminator's parameters ask for no gradients during the generator's step, as many GANs do it.
        hift: The section of both.
    """
    engines = [hift_engine(Stack(seed), stage, "fp32", hift) for seed in (1, 2)]
    oracles = [TorchHiFT(Stack(seed), blocks_of(engines[0])) for seed in (1, 2)]
    for step in range(2 * len(oracles[0].blocks)):
        gan_step(*engines, step, toggle)
        gan_step(*oracles, step, False)
    for engine, oracle in zip(engines, oracles, strict=True):
        assert_near(engine, oracle)


@pytest.mark.parametrize("toggle", (False, True), ids=("left on", "switched off"))
@pytest.mark.parametrize("hift", ({}, ONE_BLOCK), ids=("rotating", "one block"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_gan_of_two_engines_trains_both_as_the_oracle(ranks, stage, hift, toggle):
    on(ranks, gan, stage, toggle, hift)


MOST = 40  # tensors that a step makes


def out_of_memory_in_step(stage: int, dtype: str, hift: dict[str, Any]) -> None:
    """A step fails at each of its tensors in turn, is caught, and the batch comes again: training goes on as the
    oracle's, or the next forward says that the update had ended half way."""
    right = 0
    for nth in range(1, MOST):
        engine, oracle = pair(Stack, stage, dtype, hift)
        run(train_step, 4, engine, oracle)
        engine.backward(loss_of(engine(data(4))))
        with OutOfMemory(nth) as memory:
            error = error_of(engine.step)
        if memory.left > 0:
            break
        assert error.startswith("OutOfMemoryError"), error
        engine.zero_grad()
        again = error_of(lambda e=engine: run(train_step, 4, e, start=4))
        if "ended with an error half way" not in again:
            assert not again, nth
            run(train_step, 4, oracle, start=4)
            assert_near(engine, oracle, dtype)
            right += 1
    assert right >= 2


@pytest.mark.parametrize(
    ("dtype", "hift"),
    [("fp32", {}), ("bf16", {}), ("bf16", {"kernel": "triton", "state": {"master": "split16"}})],
    ids=("fp32", "bf16", "split16"),
)
@pytest.mark.parametrize("stage", (0, 2, 3))
def test_a_step_out_of_memory_has_changed_nothing_or_says_that_it_has(ranks, stage, dtype, hift):
    on(ranks, out_of_memory_in_step, stage, dtype, hift)


def torn_and_loaded(folder: str) -> None:
    """Stage 2: the new weights cannot be gathered, masters and moments have moved; a load goes on from the save."""
    engine, oracle = pair(Stack, 2, "bf16")
    run(train_step, 4, engine, oracle)
    engine.save_checkpoint(folder)
    nth = 0
    while not any(state.torn for state in engine.optimizer.states):
        nth += 1
        engine.backward(loss_of(engine(data(4))))
        with OutOfMemory(nth):
            assert error_of(engine.step).startswith("OutOfMemoryError")
        engine.zero_grad()
    for ask in (lambda: train_step(engine, 4), lambda: engine.save_checkpoint(folder)):
        assert "ended with an error half way" in error_of(ask)
    engine.load_checkpoint(folder)
    run(train_step, 4, engine, oracle, start=4)
    assert_near(engine, oracle, "bf16")


def test_a_load_mends_what_an_update_that_ended_half_way_has_left(two_ranks, tmp_path):
    on(two_ranks, torn_and_loaded, str(tmp_path))


def held(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of this rank's weights, masters, moments and counts."""
    optimizer = engine.optimizer
    held = shards_of(engine.module)
    for index, state in enumerate([*optimizer.states, *([optimizer.always] if optimizer.always else [])]):
        held |= {f"{index} {name}": tensor.clone() for name, tensor in state.tensors.items()}
        held[f"{index} step"] = torch.tensor(state.step)
    return held


def changed_by_a_failed_step(stage: int, dtype: str, hift: dict[str, Any]) -> None:
    """A step that failed at its nth tensor, where the engine does not say that it ended half way."""
    for nth in range(1, MOST):
        engine = hift_engine(Stack(), stage, dtype, hift)
        run(train_step, 4, engine)
        engine.backward(loss_of(engine(data(4))))
        before = held(engine)
        with OutOfMemory(nth) as memory:
            error = error_of(engine.step)
        if memory.left > 0:
            assert not error, error
            break
        after = held(engine)
        if not error_of(lambda e=engine: e(data(5))):
            assert moved(after, before) == [], nth


@pytest.mark.parametrize("hift", ({}, {"always_active": ["head"]}), ids=("", "always active"))
@pytest.mark.parametrize(("stage", "dtype"), ((0, "bf16"), (2, "fp32"), (3, "bf16")))
def test_a_failed_step_after_which_training_goes_on_has_changed_no_bit(ranks, stage, dtype, hift):
    on(ranks, changed_by_a_failed_step, stage, dtype, hift)
