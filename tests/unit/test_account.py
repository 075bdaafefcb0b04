"""Bytes by role against sums by hand and against the tensors that are really there."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from hift_testing.tiny_models import tiny_model
from rich.console import Console
from torch import nn

from hift_ds import gradients as gradients_module
from hift_ds.gradients import GradientReducer
from hift_ds.memory.account import Roles, full_roles, hift_roles
from hift_ds.memory.storages import StorageMeter
from hift_ds.recipes.display import memory_table
from hift_ds.rules import rule_from_config
from hift_ds.settings import Settings
from hift_ds.shards import ALIGNMENT, Averaging, BlockShard
from hift_ds.state import BlockState, Storage

CPU = torch.device("cpu")
MIB = 2**20
LARGE, SMALL, NORM = 40 * 25, 10 * 3, 7  # elements of the parameters of `Layers`


class Layers(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.ones(40, 25, dtype=dtype))
        self.small = nn.Parameter(torch.ones(10, 3, dtype=dtype))
        self.norm = nn.Parameter(torch.ones(7, dtype=dtype))
        self.register_buffer("steps", torch.zeros(5, dtype=torch.int64))


def engine_of(
    module: nn.Module,
    blocks: list[list[str]],
    stage: int,
    world: int,
    always: tuple[str, ...] = (),
    kind: str = "AdamW",
    accumulation: torch.dtype = torch.bfloat16,
    bucket_numel: int = 10**6,
    overlap: bool = True,
    micro_steps: int = 1,
    ring_bytes: int | None = None,
) -> SimpleNamespace:
    """What the account reads of an engine, as rank 0 of `world` has it; layouts and states are the real ones."""
    params = dict(module.named_parameters())
    rule, defaults = rule_from_config(kind, {})
    groups = [{"params": list(params.values()), **defaults}]
    sharded = world if stage else 1

    def state(names: list[str]) -> BlockState:
        shard = BlockShard([(name, params[name]) for name in names], dict.fromkeys(params, 0), sharded, 0)
        return BlockState(shard, rule, groups, Storage(CPU))

    states = [state(names) for names in blocks]
    resident = state(list(always)) if always else None
    averaging = Averaging(torch.bfloat16, 1.0, True)
    reducer = GradientReducer(stage, None, world, averaging, accumulation, bucket_numel, overlap)
    optimizer = SimpleNamespace(
        states=states, always=resident, reducer=reducer, rule=rule, param_groups=groups,
        settings=Settings(stage, world, 0.0, bucket_numel, False, ring_bytes=ring_bytes),
        _all_states=lambda: states if resident is None else [*states, resident],
    )  # fmt: skip
    return SimpleNamespace(module=module, optimizer=optimizer, gradient_accumulation_steps=lambda: micro_steps)


def slot(numel: int, world: int) -> int:
    """Elements that a parameter takes of a shard."""
    return math.ceil(math.ceil(numel / world) / ALIGNMENT) * ALIGNMENT


# Model weights.


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_bytes_of_the_storages_of_the_model(family, dtype):
    module = tiny_model(family).to(dtype)
    names = [name for name, _ in module.named_parameters()]
    tensors = [*module.parameters(), *module.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert hift_roles(engine_of(module, [names], 2, 2)).weights == sum(storages.values())


def test_partitioned_weights_are_the_bytes_of_this_ranks_slices():
    module = Layers(torch.bfloat16)
    for param in module.parameters():
        param.ds_id, param.ds_numel, param.ds_shape = 0, param.numel(), param.shape
        param.ds_tensor = torch.zeros(-(-param.numel() // 2), dtype=param.dtype)
        param.data = torch.empty(0, dtype=param.dtype)
    roles = full_roles(engine_of(module, [["large", "small", "norm"]], 3, 2))
    assert roles.weights == 2 * (LARGE // 2 + SMALL // 2 + 4) + 5 * 8
    assert roles.gradients == 2 * (LARGE + SMALL + NORM) // 2


# Full fine-tuning.


@pytest.mark.parametrize(("stage", "gradients", "state"), [(0, 1, 1), (1, 1, 4), (2, 4, 4)])
def test_full_fine_tuning_in_bf16_by_the_formula_of_zero(stage, gradients, state):
    """2 bytes of gradient and 12 of master, exp_avg and exp_avg_sq per parameter, over the ranks that share them."""
    numel = LARGE + SMALL + NORM
    roles = full_roles(engine_of(Layers(torch.bfloat16), [["large"], ["small", "norm"]], stage, 4))
    expected = Roles(2 * numel + 40, 2 * numel // gradients, 12 * numel // state, 0)
    assert roles == expected
    assert roles.device == sum((expected.weights, expected.gradients, expected.state))


def test_full_fine_tuning_in_fp32_has_masters_where_deepspeed_shards_them():
    """Seen in DeepSpeed 0.19.8: three tensors of a rank's share at stage 1 and up, two of the whole at stage 0."""
    numel = LARGE + SMALL + NORM
    for stage, state in ((0, 8 * numel), (1, 12 * numel // 2)):
        roles = full_roles(engine_of(Layers(torch.float32), [["large"], ["small", "norm"]], stage, 2))
        assert roles == Roles(4 * numel + 40, 4 * numel, state, 0)


def test_full_fine_tuning_is_the_same_however_the_parameters_are_rotated():
    def roles(**options: object) -> Roles:
        return full_roles(engine_of(Layers(torch.bfloat16), stage=2, world=2, **options))

    whole = roles(blocks=[["large", "small", "norm"]])
    assert roles(blocks=[["large"], ["small"]], always=("norm",)) == whole


@pytest.mark.parametrize(("kind", "slots"), [("SGD", 0), ("Lion", 1), ("Adagrad", 1)])
def test_state_counts_what_the_rule_keeps(kind, slots):
    engine = engine_of(Layers(torch.bfloat16), [["large"], ["small", "norm"]], 0, 1, kind=kind)
    assert full_roles(engine).state == 4 * (LARGE + SMALL + NORM) * (slots + 1)


# HiFT.


def test_hift_holds_the_worst_block_and_keeps_the_states_on_the_host():
    roles = hift_roles(engine_of(Layers(torch.bfloat16), [["large"], ["small", "norm"]], 2, 1))
    large, small, norm = (slot(numel, 1) for numel in (LARGE, SMALL, NORM))
    assert roles.gradients == 2 * large + 2 * LARGE  # the shard, and the gradient that is being added to it
    # new weights; master, exp_avg and exp_avg_sq, each from a multiple of 256 bytes on; the gradient in fp32
    assert roles.state == 2 * large + 3 * math.ceil(4 * large / 256) * 256 + 4 * large
    assert roles.host == 12 * (large + small + norm)


def test_host_bytes_are_those_of_the_tensors_there():
    engine = engine_of(Layers(torch.float32), [["large"], ["small", "norm"]], 2, 2)
    tensors = [tensor for state in engine.optimizer.states for tensor in state.all_tensors()]
    assert hift_roles(engine).host == sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class Sent:
    """Collectives of a rank that is told that all others have zeros; done when waited for."""

    def all_reduce(self, tensor, group, async_op):
        return self

    def reduce_scatter_tensor(self, output, tensor, group, async_op):
        output.copy_(tensor[: output.numel()])
        return self

    def wait(self):
        pass


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("bucket_numel", [1, 1500, 10**6], ids=["a-parameter", "some", "all"])
@pytest.mark.parametrize(("accumulation", "micro_steps"), [(torch.bfloat16, 1), (torch.float32, 3)])
@pytest.mark.parametrize(("stage", "world"), [(0, 1), (2, 1), (0, 2), (1, 2), (2, 2), (3, 2)])
def test_gradients_are_the_peak_of_what_the_reducer_holds(
    monkeypatch, stage, world, accumulation, micro_steps, bucket_numel, overlap
):
    monkeypatch.setattr(gradients_module, "dist", Sent())
    module = nn.Sequential(*(nn.Linear(32, 32, dtype=torch.bfloat16, bias=False) for _ in range(5)))
    names = [name for name, _ in module.named_parameters()]
    options = {"accumulation": accumulation, "bucket_numel": bucket_numel, "overlap": overlap}
    engine = engine_of(module, [names], stage, world, micro_steps=micro_steps, **options)
    reducer, shard = engine.optimizer.reducer, engine.optimizer.states[0].shard
    reducer.open([shard])
    with StorageMeter() as alive:
        for micro_step in range(micro_steps):
            for param in reversed(shard.params):
                param.grad = torch.ones_like(param)
                reducer.on_gradient(param)
            reducer.finish_backward(micro_step + 1 == micro_steps)
        result, _ = reducer.take(shard)
    assert result.nbytes <= alive.current < alive.peak
    counted = hift_roles(engine).gradients
    # While a gradient is cast for accumulation there are two of it.
    cast = 2 * 32 * 32 if stage < 2 and world > 1 and accumulation != torch.bfloat16 else 0
    assert alive.peak - cast <= counted <= alive.peak


def test_always_active_parameters_count_beside_every_block():
    alone = hift_roles(engine_of(Layers(torch.bfloat16), [["large"], ["small"]], 2, 2))
    beside = hift_roles(engine_of(Layers(torch.bfloat16), [["large"], ["small"]], 2, 2, always=("norm",)))
    assert beside.gradients - alone.gradients == 2 * (2 + 1 + 1) * slot(NORM, 2)  # for both ranks, reduced, averaged
    assert beside.state - alone.state == 12 * slot(NORM, 2)
    assert beside.host == alone.host


def test_update_of_a_large_block_holds_its_weights_the_ring_and_one_tile_of_fp32_gradient():
    smallest = 3 * 3 * 4 * 1024  # three tiles of 1024 elements: master, exp_avg, exp_avg_sq
    module = nn.Linear(100, 100, bias=False).bfloat16()
    roles = hift_roles(engine_of(module, [["weight"]], 2, 1, ring_bytes=smallest))
    assert roles.state == 2 * 100 * 100 + smallest + 4 * 1024


FACTORED = 3 * 4 * (100 + 100)  # bytes of three copies of a matrix's row and column moments


def test_factored_moments_have_their_share_of_ring_bytes():
    module = nn.Linear(100, 100, bias=False).bfloat16()
    for ring_bytes, slots in ((3 * 4096 + FACTORED, 3), (4 * 4096 + FACTORED - 1, 3), (4 * 4096 + FACTORED, 4)):
        roles = hift_roles(engine_of(module, [["weight"]], 2, 1, kind="Adafactor", ring_bytes=ring_bytes))
        assert roles.state == 2 * 100 * 100 + slots * 4096 + FACTORED + 4 * 100 * 100


def test_ring_bytes_too_small_for_tiles_and_factored_moments_are_refused_with_the_least():
    module = nn.Linear(100, 100, bias=False).bfloat16()
    with pytest.raises(ValueError, match=rf"hift\.state\.ring_bytes=14687: must be {3 * 4096 + FACTORED} or more"):
        hift_roles(engine_of(module, [["weight"]], 2, 1, kind="Adafactor", ring_bytes=3 * 4096 + FACTORED - 1))


def test_a_block_smaller_than_the_ring_takes_no_more_than_its_own_state():
    roles = hift_roles(engine_of(nn.Linear(64, 64, bias=False).bfloat16(), [["weight"]], 2, 1))
    assert roles.state == (2 + 12 + 4) * 64 * 64


# The table.


def table_of(hift: Roles, full: Roles) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(memory_table(hift, full, "counted"))
    return console.file.getvalue()


def test_table_shows_mebibytes_and_what_is_saved():
    text = table_of(Roles(8 * MIB, 2 * MIB, MIB // 2, 3 * MIB), Roles(8 * MIB, 8 * MIB, 26 * MIB, 0))
    cells = {line.split("│")[0].strip(): line.split("│")[1:] for line in text.splitlines() if "│" in line}
    shown = {role: [cell.strip() for cell in row] for role, row in cells.items()}
    assert shown == {
        "model weights": ["8.0", "8.0"],
        "gradients": ["2.0", "8.0"],
        "masters and state": ["0.5", "26.0"],
        "device, without activations": ["10.5 (-75 %)", "42.0"],
        "host memory: masters and state": ["3.0", "0.0"],
    }


def test_table_says_when_hift_needs_more():
    assert "11.0 (+10 %)" in table_of(Roles(10 * MIB, MIB, 0, 0), Roles(10 * MIB, 0, 0, 0))


def test_table_of_a_70b_model_fits_80_columns():
    huge = Roles(140 * 10**9, 140 * 10**9, 840 * 10**9, 840 * 10**9)
    lines = table_of(huge, huge).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
