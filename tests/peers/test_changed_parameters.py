"""What users do to parameters after `initialize` is honoured or refused, and never trained wrongly in silence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from hift_testing.contestants import (
    ONE_BLOCK,
    Layer,
    Stack,
    TorchHiFT,
    assert_near,
    blocks_of,
    data,
    hift_engine,
    loss_of,
    moved,
    on,
    originals,
    pair,
    run,
    shards_of,
    train_step,
    unmoved,
)
from hift_testing.messages import error_of, is_clear, messages
from hift_testing.ranks import RankPool
from hift_testing.training import DEVICE, batch_of, largest_difference, small_llama, whole_weights
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)
WHOLE = (0, 1, 2)


def embedding(rows: int) -> Callable[[nn.Module], Any]:
    return lambda module: module.resize_token_embeddings(rows, mean_resizing=False)


def add(module: nn.Module) -> None:
    module.layers[0].extra = nn.Parameter(torch.ones(3))


def add_to_head(module: nn.Module) -> None:
    module.head.extra = nn.Parameter(torch.ones(3))


def remove_bias(module: nn.Module) -> None:
    module.layers[0].linear.bias = None


def replace(module: nn.Module) -> None:
    """The same name and shape, another parameter: as a new head for another task."""
    module.head.weight = nn.Parameter(torch.zeros_like(module.head.weight))


def new_head(module: nn.Module) -> None:
    """Another module in its place: ZeRO-3 has no hooks on it."""
    module.head = nn.Linear(6, 6).to(DEVICE)


def other_shape(module: nn.Module) -> None:
    module.head.weight.data = torch.zeros(2, 6)
    module.head.bias.data = torch.zeros(2)


def other_strides(module: nn.Module) -> None:
    module.head.weight.data = module.head.weight.data.t().contiguous().t()


# name -> (model, what is done, a name that the error holds)
CHANGES: dict[str, tuple[str, Callable[[nn.Module], Any], str]] = {
    "more tokens": ("llama", embedding(100), "embed_tokens|lm_head"),
    "fewer tokens": ("llama", embedding(90), "embed_tokens|lm_head"),
    "more tokens, tied": ("tied", embedding(100), "embed_tokens|lm_head"),
    "parameter added": ("stack", add, r"layers\.0\.extra"),
    "parameter added to a block that waits": ("stack", add_to_head, r"head\.extra"),
    "parameter removed": ("stack", remove_bias, r"layers\.0\.linear\.bias"),
    "parameter replaced": ("stack", replace, r"head\.weight"),
    "module replaced": ("stack", new_head, r"head\.weight"),
    "other dtype": ("stack", lambda module: module.bfloat16(), r"layers\.0|head"),
    "other shape": ("stack", other_shape, r"head\.weight|head\.bias"),
    "other strides": ("stack", other_strides, r"head\.weight .* not contiguous"),
}

LLAMA = [name for name in CHANGES if "tokens" in name]
SMALL = [name for name in CHANGES if name not in LLAMA]


def build(model: str) -> nn.Module:
    return Stack() if model == "stack" else small_llama(layers=2, tied=model == "tied")


def train(engine: Any, model: str, step: int) -> None:
    if model == "stack":
        train_step(engine, step)
        return
    tokens = batch_of(step, 0, dist.get_rank())["input_ids"] % 90
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()


def refused_by_name(error: str, words: str) -> None:
    assert error.startswith("RuntimeError") and re.search(words, error) and is_clear(error), error


def changed_module(name: str, stage: int) -> str:
    """A change after two steps is an error at the next, which has moved nothing; the engine can then be ended."""
    model, change, words = CHANGES[name]
    module = build(model)
    engine = hift_engine(module, stage)
    for step in range(2):
        train(engine, model, step)
    change(module)
    start = shards_of(module)
    error = error_of(lambda: train(engine, model, 2))
    refused_by_name(error, words)
    assert moved(shards_of(module), start) == []
    engine.destroy()
    assert not originals(module)["hooks"]
    return error


def refused_at_the_next_step(ranks: RankPool, name: str, stage: int) -> None:
    errors = on(ranks, changed_module, name, stage)
    assert len(set(errors)) == 1


@pytest.mark.parametrize("stage", WHOLE)
@pytest.mark.parametrize("name", SMALL)
def test_a_changed_parameter_is_an_error_that_names_it(ranks, name, stage):
    refused_at_the_next_step(ranks, name, stage)


@pytest.mark.parametrize("name", [name for name in SMALL if "parameter" in name or "module" in name])
def test_a_changed_set_of_parameters_is_an_error_at_stage_3(ranks, name):
    refused_at_the_next_step(ranks, name, 3)


@pytest.mark.parametrize("stage", WHOLE)
@pytest.mark.parametrize("name", LLAMA)
def test_another_number_of_tokens_is_an_error_that_names_the_embedding(ranks, name, stage):
    refused_at_the_next_step(ranks, name, stage)


def changed_between_checkpoints(name: str, stage: int, folder: str) -> None:
    """A save, a change, and what a second save, a load and a state dict say then."""
    model, change, words = CHANGES[name]
    engine = hift_engine(build(model), stage, "fp32")
    train(engine, model, 0)
    engine.save_checkpoint(folder, "good")
    change(engine.module)
    start = shards_of(engine.module)
    refused_by_name(error_of(lambda: engine.save_checkpoint(folder, "bad")), words)
    refused_by_name(error_of(lambda: engine.load_checkpoint(folder, "good")), words)
    refused_by_name(error_of(engine.optimizer.state_dict), words)
    assert moved(shards_of(engine.module), start) == []
    engine.destroy()
    assert not Path(folder, "bad").exists()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["parameter replaced", "module replaced", "parameter added"])
def test_a_changed_module_is_neither_saved_nor_loaded_into(ranks, name, stage, tmp_path):
    """Its weights and the masters beside them would not belong together, and the next turn would bring the old back."""
    on(ranks, changed_between_checkpoints, name, stage, str(tmp_path))


def new_memory(stage: int) -> None:
    """Weights in other memory, of the same values: training goes on as if nothing were, or one clear error."""
    engine, oracle = pair(Stack, stage)
    module = engine.module
    run(train_step, 2, engine, oracle)
    start = whole_weights(oracle)
    module.head.weight.data = module.head.weight.data.clone()  # as `module.to(...)` leaves it
    error = error_of(lambda: run(train_step, 4, engine, start=2))
    if error:
        assert is_clear(error) and "head.weight" in error, error
    else:
        run(train_step, 4, oracle, start=2)
        assert_near(engine, oracle, start=start)


@pytest.mark.parametrize("stage", WHOLE)
def test_weights_in_new_memory_train_on_or_are_refused(ranks, stage):
    on(ranks, new_memory, stage)


def write(module: nn.Module, oracle: TorchHiFT, names: list[str], step: int) -> None:
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


def writes(stage: int, dtype: str, one_block: bool) -> None:
    """In-place writes under no_grad between steps (a projection, an EMA swapped in, a re-initialised layer)."""
    engine, oracle = pair(Stack, stage, dtype, ONE_BLOCK if one_block else {})
    module = engine.module
    params = dict(module.named_parameters())
    names = ["head.weight", "layers.0.linear.weight", "layers.1.linear.bias"]
    for step in range(2 * len(oracle.blocks) + 1):
        if step in (1, 3, 4):
            write(module, oracle, names, step)
        if step == 3:  # a reading is not to stand for the step's own look at what was written
            for name in names:
                assert torch.equal(deepspeed.utils.safe_get_full_fp32_param(params[name]), oracle.masters[name]), name
        train_step(engine, step)
        train_step(oracle, step)
    assert_near(engine, oracle, dtype)


@pytest.mark.parametrize("one_block", (False, True), ids=("rotating", "one block"))
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_users_write_into_weights_is_kept_and_trained_on(ranks, stage, dtype, one_block):
    on(ranks, writes, stage, dtype, one_block)


def gradients_before(stage: int, dtype: str) -> None:
    """The model comes from a torch loop that did not clear its gradients."""
    module = Stack()
    (1e3 * loss_of(module(data(9)))).backward()
    engine, twin = hift_engine(module, stage, dtype), hift_engine(Stack(), stage, dtype)
    run(train_step, 6, engine, twin)
    assert largest_difference(whole_weights(engine), whole_weights(twin)) == 0.0


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_from_before_are_in_no_update(ranks, stage, dtype):
    on(ranks, gradients_before, stage, dtype)


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


def frozen_tied(stage: int, regex: str) -> None:
    """`frozen` on one of a tensor's two names, in a cycle."""
    module = Tied()
    engine = hift_engine(module, stage, "fp32", {"frozen": [regex]})
    start = whole_weights(engine)
    for step in range(2 * len(engine.hift.blocks)):
        x = torch.arange(4).reshape(2, 2) + step % 4
        engine.backward(loss_of(engine(x)))
        engine.step()
    assert unmoved(whole_weights(engine), start) == ["embed.weight"]


@pytest.mark.parametrize("regex", ("^embed", "^head"))
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_on_either_name_freezes_a_tied_tensor(two_ranks, stage, regex):
    on(two_ranks, frozen_tied, stage, regex)


def switched_off(stage: int) -> list[str]:
    """Warnings of a user's `requires_grad_(False)` in the middle, in the parameter's turn (else it is off anyway)."""
    module, name = Stack(), "layers.0.linear.weight"
    engine = hift_engine(module, stage)
    turn = [name in block for block in blocks_of(engine)].index(True)
    run(train_step, 3 + turn, engine)
    with messages() as read:
        module.get_parameter(name).requires_grad_(False)
        run(train_step, 6, engine, start=3 + turn)
    return [text for text in read if name in text or "requires_grad" in text]


@pytest.mark.parametrize("stage", STAGES)
def test_switching_a_parameter_of_the_active_block_off_is_warned_of(ranks, stage):
    assert on(ranks, switched_off, stage)[0], "rank 0 reads a warning"


def flags_of_one_block(stage: int) -> list[bool]:
    """A parameter's flag after each step, where the user has switched it off before the third."""
    module, name = Stack(), "layers.0.linear.weight"
    engine, flags = hift_engine(module, stage, hift={"layers_per_block": 100}), []
    for step in range(5):
        if step == 2:
            module.get_parameter(name).requires_grad_(False)
        run(train_step, 1, engine, start=step)
        flags.append(module.get_parameter(name).requires_grad)
    return flags


@pytest.mark.parametrize("stage", STAGES)
def test_a_block_that_is_all_there_is_has_a_turn_at_each_step_which_sets_its_flags_anew(ranks, stage):
    assert all(flags == [True] * 5 for flags in on(ranks, flags_of_one_block, stage))


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


def complex_parameter(stage: int) -> None:
    error = error_of(lambda: hift_engine(Complex(), stage))
    assert error.startswith(("ValueError", "TypeError")) and "filter" in error and is_clear(error), error


@pytest.mark.parametrize("stage", STAGES)
def test_complex_parameters_are_refused(ranks, stage):
    on(ranks, complex_parameter, stage)


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


def partly_reentrant(stage: int) -> None:
    """Bottom-up: `layers.0.inside` has inputs that ask for no gradient at each of its turns."""
    engine = hift_engine(Partly(), stage)
    blocks = len(engine.hift.blocks)
    errors = [error_of(lambda s=step: train_step(engine, s)) for step in range(3 * blocks)]
    # One turn without a gradient is not an error yet.
    assert not any(errors[:blocks]) and any(errors)
    error = next(filter(None, errors))
    assert error.startswith("RuntimeError") and "layers.0.inside" in error and is_clear(error), error
    assert "outside" not in error


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_without_a_gradient_for_two_turns_is_an_error_that_names_it(ranks, stage):
    on(ranks, partly_reentrant, stage)


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


def sometimes(stage: int) -> None:
    """Gradients in every other turn are enough."""
    engine, oracle = pair(Sometimes, stage)

    def script(contestant: Any, step: int) -> None:
        contestant.backward(loss_of(contestant(data(step), with_b=step // 2 % 2 == 1)))
        contestant.step()

    run(script, 10, engine, oracle)
    assert_near(engine, oracle)


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_that_every_other_turn_reaches_trains(ranks, stage):
    on(ranks, sometimes, stage)
