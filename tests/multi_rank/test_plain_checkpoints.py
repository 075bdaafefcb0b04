"""A checkpoint of plain DeepSpeed, of any stage and ranks, goes on under HiFT: masters and moments, bit by bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from hift_testing.fingerprints import weights_by_name
from hift_testing.messages import error_of, logged
from hift_testing.resuming import FP16
from hift_testing.selection import slow
from hift_testing.training import (
    ds_config,
    engine_of,
    fp16_allowed,
    largest_difference,
    run_steps,
    small_llama,
    whole_weights,
)

pytestmark = pytest.mark.multi_rank
MOMENTS = ("exp_avg", "exp_avg_sq")
FROZEN = "model.layers.1.mlp.up_proj.weight"
ONE_BLOCK: dict[str, Any] = {"layers_per_block": 6}


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """As most users divide: with decay and without."""
    params = list(model.named_parameters())
    return [
        {"params": [param for _, param in params if param.ndim > 1], "weight_decay": 0.1},
        {"params": [param for _, param in params if param.ndim == 1], "weight_decay": 0.0},
    ]


def engine(stage: int, dtype: str, hift: Any, seed: int, frozen: bool = True, **extra: Any) -> Any:
    """On the same groups, with torch's AdamW, whose rates are not those that the checkpoint has."""
    model = small_llama(seed)
    model.get_parameter(FROZEN).requires_grad_(not frozen)
    lr = 1e-3 if hift is None else 7.0
    optimizer = torch.optim.AdamW(groups_of(model), lr=lr, betas=(0.9, 0.99), eps=1e-6)
    config = ds_config(stage, dtype, hift, **extra)
    del config["optimizer"]
    if dtype == "fp16":
        config["fp16"] = dict(FP16)
    with fp16_allowed():
        return engine_of(config, model, optimizer=optimizer)


def state_of(any_engine: Any) -> dict[str, torch.Tensor]:
    """Masters and moments of what is trained, whole, by DeepSpeed's own answers. Collective."""
    named = {name: param for name, param in any_engine.module.named_parameters() if name != FROZEN}
    found = {name: safe_get_full_fp32_param(param).clone() for name, param in named.items()}
    for slot in MOMENTS:
        found.update((f"{n} {slot}", safe_get_full_optimizer_state(p, slot).clone()) for n, p in named.items())
    return found


def state_of_plain(plain: Any, stage: int) -> dict[str, torch.Tensor]:
    """The same of plain DeepSpeed, which has no answer at stage 0. Collective."""
    if stage > 0:
        if stage < 3 and hasattr(plain.optimizer, "_hp_optimizer_states_linked"):
            # DeepSpeed 0.19.8 links after the first group's first step, when the second has no moments yet.
            plain.optimizer._hp_optimizer_states_linked = False
            plain.optimizer._lazy_init_hp_params_optimizer_state()
        return state_of(plain)
    named = {name: param for name, param in plain.module.named_parameters() if param.requires_grad}
    masters = {param: param for param in named.values()}
    optimizer = plain.optimizer
    if hasattr(optimizer, "fp32_groups"):
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = {param: master for params, own in groups for param, master in zip(params, own, strict=True)}
        optimizer = optimizer.optimizer
    found = {name: masters[param] for name, param in named.items()}
    for slot in MOMENTS:
        found.update((f"{name} {slot}", optimizer.state[masters[param]][slot]) for name, param in named.items())
    return {name: value.detach().clone() for name, value in found.items()}


def begun(folder: str, stage: int, dtype: str, extra: dict[str, Any]) -> tuple[Any, Any]:
    plain = engine(stage, dtype, None, 0, **extra)
    run_steps(plain, 4)
    plain.save_checkpoint(folder, client_state={"mine": 4})
    if extra == ROUND_ROBIN:  # where DeepSpeed 0.19.8 answers for other parameters than those asked for
        masters = get_fp32_state_dict_from_zero_checkpoint(folder)
        named = dict(plain.module.named_parameters())
        return {name: masters[name].detach() for name in named if name != FROZEN}, weights_by_name(plain)
    return state_of_plain(plain, stage), weights_by_name(plain)


def taken_over(
    folder: str, stage: int, dtype: str, hift: dict[str, Any], rate: float
) -> tuple[Any, Any, list[str], Any, int]:
    taken = engine(stage, dtype, hift, 1)
    with logged("hift_ds.engine_loading") as notes:
        _, client = taken.load_checkpoint(folder)
    assert client["mine"] == 4 and taken.global_steps == 4
    states = taken.optimizer.states
    (step,) = {state.step for state in states}
    assert taken.optimizer.rotation.step == 0
    assert taken.get_lr() == [rate, rate]
    found = state_of(taken)
    scale = taken.optimizer.loss_scale
    weights = weights_by_name(taken)
    run_steps(taken, 8)
    assert all(torch.isfinite(param).all() for param in taken.module.parameters())
    return found, weights, notes, scale, step


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name in found if not torch.equal(found[name], wanted[name])]


ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}
ELASTIC = {"zero_optimization": {"elastic_checkpoint": True}}
SMALL = {"zero_optimization": {"sub_group_size": 3000}}
CASES = [
    ((2, 0, "fp32"), (2, 2), {}), ((2, 0, "bf16"), (1, 3), {}), ((2, 1, "bf16"), (1, 0), {}),
    ((2, 2, "fp32"), (2, 3), {}), ((2, 3, "bf16"), (2, 2), SMALL), ((1, 3, "fp32"), (2, 0), {}),
    slow((1, 3, "bf16"), (2, 3), {}), slow((2, 3, "fp32"), (1, 3), {}), slow((1, 2, "bf16"), (2, 1), {}),
    slow((2, 2, "fp16"), (2, 2), {}),
    slow((2, 1, "bf16"), (2, 1), {"data_types": {"grad_accum_dtype": "fp32"}}),
    slow((2, 1, "fp32"), (1, 1), ELASTIC),
    slow((2, 2, "bf16"), (2, 2), ROUND_ROBIN),
]  # fmt: skip


@pytest.mark.parametrize(("then", "now", "extra"), CASES)
def test_masters_and_moments_of_plain_deepspeed_are_taken_over_bit_by_bit(
    one_rank, two_ranks, tmp_path, then, now, extra
):
    pools = {1: one_rank, 2: two_ranks}
    ranks, stage, dtype = then
    wanted, weights = pools[ranks].run(begun, str(tmp_path), stage, dtype, extra)[0]
    hift = {"kernel": "triton", "state": {"master": "split16"}} if dtype == "bf16" else {"order": "random"}
    rate = 7.0 if extra == ELASTIC else 1e-3  # the checkpoint's, as with plain DeepSpeed; an elastic one has none
    for found, weights_now, notes, scale, step in pools[now[0]].run(
        taken_over, str(tmp_path), now[1], dtype, hift, rate
    ):
        known = {name: value for name, value in found.items() if name in wanted}
        assert same(known, wanted) == [] and weights_now == weights
        # DeepSpeed's own for 16 bits at stage 0 makes an update with zeros when it is made.
        assert step == (5 if stage == 0 and dtype != "fp32" else 4)
        assert scale == (2.0 ** 7 if dtype == "fp16" else 1.0)  # once doubled: three steps and more without overflow
        assert all("plain DeepSpeed" in note or "converted" in note for note in notes)


def flatten_masters(path: Path) -> None:
    """As DeepSpeed writes it of a fused optimizer, which wants a GPU: each group's masters and moments flat."""
    file = torch.load(path, weights_only=False)
    optimizer = file["optimizer"]
    inner, flat = optimizer["optimizer_state_dict"], lambda parts: torch.cat([part.reshape(-1) for part in parts])
    optimizer["fp32_groups_flat"] = [flat(group) for group in optimizer.pop("fp32_groups")]
    states = [[inner["state"][index] for index in group["params"]] for group in inner["param_groups"]]
    inner["state"] = {
        number: {"step": parts[0]["step"], **{slot: flat(part[slot] for part in parts) for slot in MOMENTS}}
        for number, parts in enumerate(states)
    }  # fmt: skip
    for number, group in enumerate(inner["param_groups"]):
        group["params"] = [number]
    torch.save(file, path)


def test_masters_of_a_fused_optimizer_are_taken_over(one_rank, tmp_path):
    wanted, _ = one_rank.run(begun, str(tmp_path), 0, "bf16", {})[0]
    flatten_masters(tmp_path / "global_step4" / "mp_rank_00_model_states.pt")
    found = one_rank.run(taken_over, str(tmp_path), 2, "bf16", {}, 1e-3)[0][0]
    assert same(found, wanted) == []


def without_state(folder: str, then: int, now: int) -> list[str]:
    """SGD without momentum keeps nothing: the weights are all there is to take over, and nothing begins anew."""
    config = ds_config(then, "fp32", None, zero_allow_untested_optimizer=True)
    del config["optimizer"]
    plain = engine_of(config, model := small_llama(0), optimizer=torch.optim.SGD(model.parameters(), 0.1))
    run_steps(plain, 3)
    plain.save_checkpoint(folder)
    taken = engine_of(ds_config(now, "fp32", {}, optimizer={"type": "SGD", "params": {"lr": 0.2}}), small_llama(1))
    with logged("hift_ds.engine_loading") as notes:
        taken.load_checkpoint(folder)
    assert weights_by_name(taken) == weights_by_name(plain) and taken.get_lr() == [0.1]
    run_steps(taken, 2)
    return notes


@pytest.mark.parametrize(("then", "now"), [(0, 2), slow(2, 0)])
def test_an_optimizer_without_state_is_taken_over(two_ranks, tmp_path, then, now):
    for notes in two_ranks.run(without_state, str(tmp_path), then, now):
        assert all("masters of 39 parameters, moments of 0" in note for note in notes), notes


def gone_on(folder: str, stage: int) -> tuple[float, float]:
    """How far one block of everything is from plain DeepSpeed after the steps that follow; from where it began."""
    plain = engine(stage, "fp32", None, 0, frozen=False)
    run_steps(plain, 4)
    plain.save_checkpoint(folder)
    begin = {name: value for name, value in state_of_plain(plain, stage).items() if " " not in name and name != FROZEN}
    run_steps(plain, 4, start=4)
    straight = {name: value for name, value in state_of_plain(plain, stage).items() if name in begin and name != FROZEN}
    taken = engine(stage, "fp32", ONE_BLOCK, 1, frozen=False)
    taken.load_checkpoint(folder)
    run_steps(taken, 4, start=4)
    found = {name: value for name, value in state_of(taken).items() if name in straight}
    return largest_difference(found, straight), largest_difference(found, begin)


@pytest.mark.parametrize("stage", [2, slow(0), slow(1), slow(3)])
def test_one_block_goes_on_as_plain_deepspeed_would_have(two_ranks, tmp_path, stage):
    for apart, moved in two_ranks.run(gone_on, str(tmp_path), stage):
        assert apart < 2e-7 and moved > 1e-3


class Odd(torch.nn.Module):
    """Of sizes that nothing divides, so that DeepSpeed pads; with a head that is the embedding, or its own."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(19, 7)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(7, 7) for _ in range(3))
        self.head = torch.nn.Linear(7, 19, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return torch.nn.functional.cross_entropy(self.head(hidden[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, 1e-2, eps=1e-6),
    "sgd": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "adagrad": lambda params: torch.optim.Adagrad(params, 1e-2),
}  # fmt: skip


def odd_engine(stage: int, rule: str, tied: bool, hift: Any) -> Any:
    config = ds_config(stage, "fp32", hift, zero_allow_untested_optimizer=True)
    del config["optimizer"]
    model = Odd(tied)
    return engine_of(config, model, optimizer=OPTIMIZERS[rule](model.parameters()))


def odd_steps(any_engine: Any, steps: range) -> None:
    for step in steps:
        ids = torch.randint(0, 19, (2, 9), generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))
        any_engine.backward(any_engine(ids))
        any_engine.step()


def odd(folder: str, cases: list[tuple[int, int, str, bool]]) -> list[float]:
    """How far HiFT's steps are from plain DeepSpeed's, behind the same checkpoint."""
    apart = []
    for number, (then, now, rule, tied) in enumerate(cases):
        plain = odd_engine(then, rule, tied, None)
        odd_steps(plain, range(3))
        plain.save_checkpoint(f"{folder}/{number}")
        odd_steps(plain, range(3, 6))
        taken = odd_engine(now, rule, tied, ONE_BLOCK)
        taken.load_checkpoint(f"{folder}/{number}")
        odd_steps(taken, range(3, 6))
        apart.append(largest_difference(whole_weights(taken), whole_weights(plain)))
    return apart


ODD = [(stage, (stage + 1) % 4, rule, stage % 2 == 1) for stage in range(4) for rule in OPTIMIZERS]


@pytest.mark.parametrize("ranks", [2, slow(1)])
def test_padding_ties_and_optimizers_that_count_no_steps_are_no_hindrance(one_rank, two_ranks, tmp_path, ranks):
    for apart in {1: one_rank, 2: two_ranks}[ranks].run(odd, str(tmp_path), ODD):
        assert max(apart) < 5e-7, list(zip(ODD, apart, strict=True))


def other_order(folder: str) -> None:
    """At stage 0 the files have no names; a schedule of another class is one that torch would take."""
    plain = engine(0, "fp32", None, 0)
    run_steps(plain, 2)
    plain.save_checkpoint(folder)
    model = small_llama(1)
    groups = [{**group, "params": group["params"][::-1]} for group in groups_of(model)]
    taken = engine_of(ds_config(2, "fp32", {}), model, optimizer=torch.optim.AdamW(groups, 1e-3))
    before = weights_by_name(taken)
    error = error_of(lambda: taken.load_checkpoint(folder))
    assert "give the optimizer the same parameters in the same order" in error and weights_by_name(taken) == before

    def scheduled(hift: Any, make: Any) -> Any:
        model = small_llama(0)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        config = ds_config(2, "fp32", hift)
        del config["optimizer"]
        return engine_of(config, model, optimizer=optimizer, lr_scheduler=make(optimizer))

    cosine = scheduled(None, lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9))
    run_steps(cosine, 2)
    cosine.save_checkpoint(folder, tag="cosine")
    steps = scheduled({}, lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3))
    error = error_of(lambda: steps.load_checkpoint(folder, tag="cosine"))
    assert "lr_scheduler has 'T_max', 'eta_min', which this run's (StepLR) has not" in error, error
    same = scheduled({}, lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9))
    same.load_checkpoint(folder, tag="cosine")
    assert same.lr_scheduler.last_epoch == 2


def test_parameters_in_another_order_and_a_schedule_of_another_class_are_refused(two_ranks, tmp_path):
    two_ranks.run(other_order, str(tmp_path))


def universal(folder: str, stage: int) -> tuple[Any, Any, int]:
    taken = engine(stage, "fp32", {}, 1)
    taken.load_checkpoint(folder, tag="u")
    return state_of(taken), weights_by_name(taken), {state.step for state in taken.optimizer.states}


@pytest.mark.parametrize(("stage", "now"), [slow(2, 3), (3, 1)])
def test_a_universal_checkpoint_is_taken_over(one_rank, two_ranks, tmp_path, stage, now):
    wanted, weights = two_ranks.run(begun, str(tmp_path), stage, "fp32", {})[0]
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(tmp_path / "global_step4"), "--output_folder", str(tmp_path / "u")]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run([*convert, *folders, *workers], check=True, timeout=120, capture_output=True)
    found, weights_now, steps = one_rank.run(universal, str(tmp_path), now)[0]
    assert same(found, wanted) == [] and weights_now == weights and steps == {4}


def refused(folder: str) -> None:
    """Each before anything is changed."""
    root = Path(folder)
    if dist.get_rank() == 0:
        for tag in ("less", "cut", "none"):
            shutil.copytree(root / "global_step4", root / tag)
        (path,) = (root / "less").glob("*rank_1*optim_states.pt")
        path.unlink()
        (path,) = (root / "cut").glob("*rank_1*optim_states.pt")
        path.write_bytes(path.read_bytes()[:3000])
        for path in (root / "none").glob("*optim_states.pt"):
            path.unlink()
    dist.barrier()
    taken = engine(2, "fp32", {}, 1)
    before = weights_by_name(taken)

    def loads(tag: str, other: Any = None, **how: Any) -> str:
        return error_of(lambda: (other or taken).load_checkpoint(folder, tag=tag, **how))

    assert "is of 2 ranks and has 1 files of optimizer state" in loads("less")
    assert "optim_states.pt' cannot be read" in loads("cut")
    assert "has no optimizer state: load its weights alone" in loads("none")
    assert weights_by_name(taken) == before
    taken.load_checkpoint(folder, tag="none", load_module_only=True)
    assert weights_by_name(taken) != before
    other = engine_of(ds_config(2, "fp32", {}), small_llama(1))
    assert "another number of param groups (2; this run: 1)" in loads("global_step4", other)
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}
    scheduled = engine(2, "fp32", {}, 1, scheduler=schedule)
    assert "another lr_scheduler (None; this run: WarmupLR)" in loads("global_step4", scheduled)
    scheduled.load_checkpoint(folder, load_lr_scheduler_states=False)
    rule = engine_of(
        ds_config(2, "fp32", {}), model := small_llama(1), optimizer=torch.optim.SGD(groups_of(model), 0.1, 0.9)
    )
    with logged("hift_ds.engine_loading") as notes:
        rule.load_checkpoint(folder)
    assert {state.step for state in rule.optimizer.states} == {0}
    run_steps(rule, 2)  # what is true or false in the checkpoint's groups is not this run's
    assert dist.get_rank() or any("which begin anew" in note for note in notes)


def test_what_does_not_fit_is_refused_and_moments_of_another_rule_begin_anew(two_ranks, tmp_path):
    two_ranks.run(begun, str(tmp_path), 2, "fp32", {})
    two_ranks.run(refused, str(tmp_path))
