"""What people do between steps changes nothing, and what HiFT cannot train is refused with a sentence."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero import unwrap_model_for_generation
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from hift_testing.contestants import Stack, hift_engine, moved, on, plain_engine, shards_of
from hift_testing.device_meter import separate_host
from hift_testing.messages import error_of, messages
from hift_testing.selection import slow
from hift_testing.training import batch_of, ds_config, engine_of, largest_difference, run_steps, whole_weights
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.multi_rank

STAGES = (0, 1, 2, 3)


def generating(stage: int) -> None:
    """What forwards in inference mode, at stage 3 with ZeRO's hooks taken off too, change between steps."""
    runs = []
    for generates in (True, False):
        engine = engine_of(ds_config(stage, "fp32", {}))
        for step in range(9):
            if generates:
                with torch.inference_mode():
                    engine(**batch_of(step, 3, 0))
                if stage == 3:
                    with unwrap_model_for_generation(engine), torch.no_grad():
                        engine.module(**batch_of(step, 4, 0))
                    engine.empty_partition_cache()
            run_steps(engine, 1, start=step)
        runs.append(whole_weights(engine))
    assert largest_difference(*runs) == 0.0


# At stage 3 `make test` generates under inference mode (test_zero3.py).
@pytest.mark.parametrize("stage", (0, 1, 2, slow(3)))
def test_generation_between_steps_changes_nothing(two_ranks, stage):
    on(two_ranks, generating, stage)


def consolidated() -> None:
    """Stage 3: what Trainer saves with PEFT, on rank 0."""
    engine = engine_of(ds_config(3, "fp32", {}))
    assert engine.optimizer.parameter_offload.module is engine.module
    found = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    wanted = whole_weights(engine)
    if dist.get_rank() == 0:
        assert all(torch.equal(found[name].float(), weight) for name, weight in wanted.items())
    else:
        assert not found


def test_the_consolidated_weights_of_stage_3_have_every_trained_parameter(two_ranks):
    on(two_ranks, consolidated)


RESIDENT = {"state": {"residency": "device"}, "always_active": ["norm"]}
KINDS = [None, *([kind] for kind in OffloadStateTypeEnum)]


def offloading(stage: int, dtype: str, hift: dict[str, Any]) -> None:
    """States off-loaded and brought back before each step, every kind by itself and all; without `hift` they stream."""
    runs = []
    for offloads in (True, False):
        with nullcontext() if hift else separate_host():
            engine = engine_of(ds_config(stage, dtype, hift))
        assert bool(hift) == (engine.optimizer.ring is None)
        for step in range(7):
            if offloads:
                engine.offload_states(include=KINDS[step % len(KINDS)])
                if step == 0:  # all kinds are away
                    assert "call engine.reload_states() first" in error_of(lambda e=engine: run_steps(e, 1))
                engine.reload_states()
            run_steps(engine, 1, start=step)
        runs.append(whole_weights(engine))
    assert largest_difference(*runs) == 0.0


@pytest.mark.parametrize("hift", [{}, RESIDENT], ids=["streaming", "resident"])
@pytest.mark.parametrize("stage", STAGES)
def test_states_that_went_to_the_host_and_back_train_bitwise_as_if_they_had_stayed(two_ranks, stage, hift):
    on(two_ranks, offloading, stage, "bf16", hift)


def while_offloaded(stage: int, folder: str) -> None:
    """What is asked of an engine whose states are off-loaded; then whether it still trains as one that never was."""
    engines = [engine_of(ds_config(stage, "bf16", RESIDENT)) for _ in range(2)]
    for engine in engines:
        run_steps(engine, 2)
        params = list(engine.module.parameters())
        with deepspeed.zero.GatheredParameters(params, modifier_rank=0, enabled=stage == 3), torch.no_grad():
            for param in params:
                param.add_(0.25)  # what the user writes just before must not be lost
    engine, stayed = engines
    engine.save_checkpoint(folder, tag="good")
    dist.barrier()
    manifest = Path(folder, "good", "hift.json").read_text()
    kept = shards_of(engine.module)
    for each in engines:
        each.backward(each(**batch_of(2, 0, dist.get_rank())).loss)
    engine.offload_states(include=[OffloadStateTypeEnum.optim_states])
    with torch.no_grad():
        engine(**batch_of(0, 3, 0))  # rollouts need the weights alone
    engine.offload_states()  # and now the rest
    first = engine.optimizer.states[0]
    asked = {
        "forward": lambda: engine(**batch_of(0, 3, 0)),
        "step": engine.step,
        "optimizer.step": lambda: engine.optimizer.step(),
        "save": lambda: engine.save_checkpoint(folder, tag="good"),
        "save weights": lambda: engine.save_16bit_model(folder),
        "load": lambda: engine.load_checkpoint(folder, tag="good"),
        "master": lambda: deepspeed.utils.safe_get_full_fp32_param(first.shard.params[0]),
    }
    for name, ask in asked.items():
        sentence = "RuntimeError: states are offloaded (engine.offload_states): call engine.reload_states() first"
        assert error_of(ask) == sentence, name
    assert moved(shards_of(engine.module), kept) == []
    assert first.master.untyped_storage().nbytes() == first.slots["exp_avg"].untyped_storage().nbytes() == 0
    engine.reload_states()
    for each in engines:
        each.step()  # what was refused meanwhile has lost no gradient
        run_steps(each, 8, start=3)
    assert largest_difference(whole_weights(engine), whole_weights(stayed)) == 0.0
    engine.offload_states()
    engine.destroy()
    assert Path(folder, "good", "hift.json").read_text() == manifest
    assert largest_difference(whole_weights(engine), whole_weights(stayed)) == 0.0


@pytest.mark.parametrize("stage", (slow(0), slow(1), slow(2), 3))
def test_offloaded_states_are_never_read_and_come_back_with_what_the_user_wrote(two_ranks, tmp_path, stage):
    on(two_ranks, while_offloaded, stage, str(tmp_path))


class Untrainable(nn.Module):
    """`kind` says what HiFT cannot train in it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, sparse=kind == "sparse")
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.layers[0].sparse = True  # of a user's own, and no embedding
        if kind == "complex":
            self.phases = nn.Parameter(torch.ones(3, dtype=torch.complex64))


def refused(stage: int, kind: str) -> str:
    """The error of `initialize`."""
    if kind == "zero.Init":
        with deepspeed.zero.Init(config_dict_or_path=ds_config(3)):
            module: nn.Module = Stack()
    else:
        module = Untrainable(kind)
    return error_of(lambda: hift_engine(module, stage))


@pytest.mark.parametrize(
    ("stage", "kind", "sentence"),
    [
        *((stage, "complex", "ValueError: phases: a complex parameter") for stage in STAGES),
        *((stage, "sparse", "ValueError: embed: an embedding with sparse=True") for stage in STAGES),
        *((stage, "zero.Init", "is a ZeRO-3 parameter") for stage in STAGES[:3]),
        (1, "nothing", ""),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(one_rank, stage, kind, sentence):
    error = on(one_rank, refused, stage, kind)[0]
    assert sentence in error
    assert bool(sentence) == bool(error)


class HalfReentrant(nn.Module):
    """Half of a layer inside reentrant checkpointing, which gives it no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.outside, self.inside = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outside(x) + checkpoint(self.inside, x.detach(), use_reentrant=True)


def half_a_layer_reentrant(stage: int, no_gradient: str) -> tuple[int, str, list[str]]:
    """Steps until one raises, at most four cycles of two blocks; the error; whom warnings name."""
    torch.manual_seed(0)
    module = nn.Sequential(HalfReentrant(), HalfReentrant())
    engine = hift_engine(module, stage, hift={"blocks": [[r"^0\."], [r"^1\."]], "no_gradient": no_gradient})
    error, steps = "", -1
    with messages() as read:
        while not error and steps < 8:
            error = error_of(lambda: (engine.backward(engine(torch.ones(2, 6)).square().mean()), engine.step()))
            steps += 1
    return steps, error, [text.partition(" received")[0] for text in read if "whole turns" in text]


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_without_gradients_in_two_whole_turns_is_an_error_that_names_it(two_ranks, stage):
    for steps, error, _ in on(two_ranks, half_a_layer_reentrant, stage, "error"):
        assert steps == 2
        assert error.startswith("RuntimeError: 0.inside.weight, 0.inside.bias received no gradient on any")


@pytest.mark.parametrize("stage", (0, 3))
def test_with_skip_such_a_parameter_is_named_in_one_warning(two_ranks, stage):
    named = ["0.inside.weight, 0.inside.bias", "1.inside.weight, 1.inside.bias"]
    assert on(two_ranks, half_a_layer_reentrant, stage, "skip") == [(8, "", named)] * 2


ATTRIBUTES = (
    "state", "param_groups", "loss_scale", "cur_scale", "overflow", "custom_loss_scaler", "dynamic_loss_scale",
)  # fmt: skip
METHODS = ("get_lr", "get_mom", "get_type", "loss_scale", "dynamic_loss_scale", "optimizer_name", "was_step_applied")


def type_of(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {', '.join(sorted({type_of(item) for item in value}))}"
    return f"{type(value).__name__} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def types(stage: int, dtype: str) -> list[dict[str, str]]:
    """Of what DeepSpeed's returned optimizer and its engine offer, by name; of ours what is there of it."""
    found = []
    for make in (plain_engine, hift_engine):
        engine = make(Stack(), stage, dtype)
        facts = {"norm before": engine.get_global_grad_norm()}
        engine.backward(engine(torch.ones(2, 6)).float().square().mean())
        engine.step()
        optimizer = engine.optimizer
        facts |= {name: getattr(optimizer, name) for name in ATTRIBUTES if hasattr(optimizer, name)}
        for name in METHODS:
            facts[f"engine.{name}"] = getattr(engine, name)()
        facts["norm"], facts["holder"] = engine.get_global_grad_norm(), engine.basic_optimizer
        facts["zero_grad"] = optimizer.zero_grad(set_to_none=True)
        if hasattr(optimizer, "get_lr"):
            optimizer.set_lr(0.25)
            facts["get_lr"], facts["lr of groups"] = optimizer.get_lr(), [g["lr"] for g in optimizer.param_groups]
        keys = set(optimizer.state_dict())
        found.append({name: type_of(value) for name, value in facts.items()})
        found[-1]["holder"] = str(isinstance(facts["holder"], torch.optim.Optimizer))
        found[-1]["keys"] = str(sorted(keys & {"zero_stage", "partition_count"}))
        found[-1]["lr of groups"] = str(facts.get("lr of groups"))
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_deepspeeds_optimizer_and_engine_offer_has_the_same_type(one_rank, stage, dtype):
    plain, ours = on(one_rank, types, stage, dtype)[0]
    if stage == 0:
        plain["keys"] = ours["keys"]
        if dtype == "fp32":  # where DeepSpeed has no norm
            plain["norm"] = "float"
    if "get_lr" not in plain:  # stage 0 in fp32 is the bare torch optimizer
        plain["lr of groups"] = ours["lr of groups"]
    del plain["engine.optimizer_name"]  # "adamw" from our config; DeepSpeed's is here a client's optimizer
    assert plain.items() <= ours.items()
    assert ours["lr of groups"] == "[0.25]"
