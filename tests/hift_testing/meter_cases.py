"""Cases that run on ranks: the memory meter around real steps."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from hift_testing.forecast_cases import LLAMA, ROWS, SEQ, VOCAB, ZERO
from hift_testing.training import ds_config, engine_of
from transformers import LlamaConfig, LlamaForCausalLM

from hift_ds.memory import MemoryMeter
from hift_ds.memory.plan import Planner
from hift_ds.memory.request import Request


def metered(stage: int, dtype: str, hift: dict[str, Any] | None, folder: str | None = None) -> dict[str, Any]:
    """Two cycles (or 8 steps of full fine-tuning) inside a meter, then a step outside of it.

    Returns:
        `report`: as JSON; `forecast`: the plan's peaks by block with all state in one memory, as on a CPU; `weights`
        and `state`: bytes by the tensors' sizes; `restored`: the engine's methods are its class's again; `events`:
        files of TensorBoard.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, use_cache=False))
    config = ds_config(stage, dtype, hift, zero_optimization=ZERO, train_micro_batch_size_per_gpu=ROWS)
    if hift is None:
        config["optimizer"]["params"]["torch_adam"] = True  # else DeepSpeed compiles its own
    if folder is not None:
        config["tensorboard"] = {"enabled": True, "output_path": folder, "job_name": "run"}
    engine = engine_of(copy.deepcopy(config), model, model_parameters=model.parameters())
    steps = 8 if hift is None else 2 * len(engine.hift.blocks)
    with MemoryMeter(engine) as meter:
        _train(engine, steps)
    _train(engine, 1)
    report = meter.gather()
    facts: dict[str, Any] = {"report": report.to_json(), "peaks": report.block_peaks(), "table": _text(report)}
    facts["restored"] = not {"forward", "backward", "step"} & set(vars(engine))
    facts["samples"] = [asdict(sample) for sample in report.ranks[dist.get_rank()].samples]
    if folder is not None:
        report.write(Path(folder, "reports", f"{dist.get_rank()}.json"))
        facts["same"] = json.loads(Path(folder, "reports", f"{dist.get_rank()}.json").read_text()) == report.to_json()
        facts["events"] = sorted(path.name for path in Path(folder, "run").glob("events.*"))
    facts["weights"] = sum(
        (param.ds_tensor if hasattr(param, "ds_id") else param).nbytes for param in engine.module.parameters()
    ) + sum(buffer.nbytes for buffer in engine.module.buffers())
    if hift is not None:
        facts["state"] = sum(t.nbytes for state in engine.optimizer.states for t in state.all_tensors())
        request = Request(config, SEQ, None, gpus=engine.dp_world_size, device_type="cpu")
        if dist.get_rank() == 0:
            facts["forecast"] = [block.peak for block in Planner(LlamaConfig(**LLAMA)).plan(request).blocks]
    return facts


def _train(engine: Any, steps: int) -> None:
    for step in range(steps):
        ids = torch.randint(0, VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(step))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def _text(report: Any) -> str:
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=80)
    console.print(report.table())
    return console.file.getvalue()
