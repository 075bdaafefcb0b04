"""The memory meter: what it finds are the tensors that exist, on every rank, by block, phase and role."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from hift_testing.measured_model import LLAMA, ROWS, SEQ, ZERO, measured_llama, tokens_of
from hift_testing.selection import slow
from hift_testing.training import ds_config, engine_of
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig

from hift_ds.memory import MemoryMeter
from hift_ds.memory.planner import Planner
from hift_ds.memory.request import Request

pytestmark = pytest.mark.multi_rank
ROLES = ("weights", "gradients", "state", "activations", "other")


def measured(stage: int, dtype: str, hift: dict[str, Any] | None, folder: str | None = None) -> dict[str, Any]:
    """Two cycles (or 8 steps of full fine-tuning) inside a meter, then a step outside of it.

    Returns:
        `report`: as JSON; `table`: as text; `samples`: this rank's; `peaks`: by block; `forecast`: the planner's peaks
        by block with all state in one memory, as on a CPU; `weights` and `state`: bytes by the tensors' sizes.
    """
    torch.manual_seed(0)
    model = measured_llama()
    config = ds_config(stage, dtype, hift, zero_optimization=ZERO, train_micro_batch_size_per_gpu=ROWS)
    if hift is None:
        config["optimizer"]["params"]["torch_adam"] = True  # else DeepSpeed compiles its own
    if folder is not None:
        config["tensorboard"] = {"enabled": True, "output_path": folder, "job_name": "run"}
    engine = engine_of(copy.deepcopy(config), model, model_parameters=model.parameters())
    steps = 8 if hift is None else 2 * len(engine.hift.blocks)
    with MemoryMeter(engine) as meter:
        train(engine, steps)
    train(engine, 1)
    report = meter.gather()
    facts: dict[str, Any] = {"report": report.to_json(), "peaks": report.block_peaks(), "table": text_of(report)}
    assert not {"forward", "backward", "step"} & set(vars(engine)), "the engine's methods are its class's again"
    facts["samples"] = [asdict(sample) for sample in report.ranks[dist.get_rank()].samples]
    if folder is not None:
        path = Path(folder, "reports", f"{dist.get_rank()}.json")
        report.write(str(path))
        assert json.loads(path.read_text()) == report.to_json()
    facts["weights"] = sum(
        (param.ds_tensor if hasattr(param, "ds_id") else param).nbytes for param in engine.module.parameters()
    ) + sum(buffer.nbytes for buffer in engine.module.buffers())
    if hift is not None:
        facts["state"] = sum(t.nbytes for state in engine.optimizer.states for t in state.all_tensors())
        request = Request(config, SEQ, None, gpus=engine.dp_world_size, device_type="cpu")
        if dist.get_rank() == 0:
            facts["forecast"] = [block.peak for block in Planner(LlamaConfig(**LLAMA)).forecast(request).blocks]
    return facts


def train(engine: Any, steps: int) -> None:
    for step in range(steps):
        batch = tokens_of(step)  # alive until the next, as a script's
        engine.backward(engine(**batch).loss)
        engine.step()


def text_of(report: Any) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(report.table())
    return console.file.getvalue()


@pytest.fixture(scope="module")
def metered(two_ranks):
    """Results by (stage, dtype, hift), each trained once."""
    found = {}

    def of(stage, dtype, hift):
        key = (stage, dtype, hift)
        if key not in found:
            found[key] = two_ranks.run(measured, stage, dtype, {} if hift else None)
        return found[key]

    return of


@pytest.mark.parametrize(("stage", "dtype"), [slow(2, "bf16"), (3, "fp32")])
def test_roles_add_up_to_the_peak_and_weights_and_state_are_the_tensors(metered, stage, dtype):
    for facts in metered(stage, dtype, True):
        for sample in facts["samples"]:
            assert sum(sample[role] for role in ROLES) == sample["allocated"]
            assert sample["state"] == facts["state"]
            assert sample["activations"] > 0 and sample["gradients"] >= 0
        assert all(sample["gradients"] > 0 for sample in facts["samples"] if sample["phase"] == "backward")
        beside = {s["weights"] - facts["weights"] for s in facts["samples"] if s["phase"] == "update"}
        assert beside == {0}  # at stage 3 the next forward, not the update, gathers the small parameters


@pytest.mark.parametrize(("stage", "dtype"), [slow(2, "bf16"), (3, "fp32")])
def test_peaks_of_every_block_are_those_of_the_forecast(metered, stage, dtype):
    results = metered(stage, dtype, True)
    forecast = results[0]["forecast"]
    assert sorted(results[0]["peaks"]) == list(range(len(forecast)))
    for block, peak in results[0]["peaks"].items():
        assert abs(peak - forecast[block]) <= 0.02 * peak


def test_every_rank_gets_the_peaks_of_all_ranks_and_each_block_and_phase_has_one(metered):
    results = metered(2, "bf16", True)
    assert results[0]["report"] == results[1]["report"]
    ranks = results[0]["report"]["ranks"]
    assert [record["rank"] for record in ranks] == [0, 1]
    for record in ranks:
        found = [(sample["block"], sample["phase"]) for sample in record["samples"]]
        assert sorted(found) == sorted({(b, p) for b in range(6) for p in ("forward", "backward", "update")})
    assert results[0]["report"]["peak_allocated"] == max(s["allocated"] for r in ranks for s in r["samples"])


def test_a_cpu_s_figures_are_never_called_gpu_memory(metered):
    report, table = metered(2, "bf16", True)[0]["report"], metered(2, "bf16", True)[0]["table"]
    assert "not GPU memory" in report["kind"] and "not GPU memory" in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.slow
def test_full_fine_tuning_is_measured_too_and_takes_more(metered):
    full, hift = metered(2, "bf16", False)[0], metered(2, "bf16", True)[0]
    assert {sample["block"] for sample in full["samples"]} == {-1}
    # One memory on a CPU: what HiFT saves there is gradients.
    assert full["report"]["peak_allocated"] > hift["report"]["peak_allocated"]
    numel = full["weights"] // 2  # in bf16; the few rotary frequencies make the difference
    assert all(abs(sample["state"] - 12 * numel // 2) < 2048 for sample in full["samples"])


def test_the_engine_is_as_before_after_the_meter_and_tensorboard_and_json_have_the_peaks(two_ranks, tmp_path):
    results = two_ranks.run(measured, 1, "bf16", {}, str(tmp_path))
    assert len(list((tmp_path / "run").glob("events.*"))) == 1
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    peaks = [event.value for event in events.Scalars("Memory/peak_allocated_bytes")]
    assert len(peaks) == 2 * 6
    assert max(peaks) == pytest.approx(max(s["allocated"] for s in results[0]["samples"]), rel=1e-6)
