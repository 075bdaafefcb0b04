"""One run of the comparison of quality, and the costs of a method. One rank, fp32, no ZeRO.

All methods have one loop and one engine, DeepSpeed's: full fine-tuning, LoRA and the last layer are `initialize`
without a "hift" section and with other parameters to train. So they differ in nothing else.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

import hift_ds
from hift_ds.memory import MemoryMeter
from hift_ds.recipes import training
from hift_ds.recipes.quality import Result, Settings, described
from hift_ds.recipes.quality_plan import METHODS, OPTIMIZER, Method, Task
from hift_ds.recipes.quality_tasks import TaskData, TokenRow, in_groups, load_network, sums_of
from hift_ds.recipes.results import provenance

_ROUNDS, _LEAST_TIMED = 3, 8  # steps of a round, whole cycles


def train(task: Task, data: TaskData, settings: Settings) -> Result:
    """Trains with these settings and evaluates once, on the part that they name."""
    name, steps = settings["method"]["name"], settings["steps"]
    engine = _engine(task, data, METHODS.get(name), settings["rate"], steps, settings["seed"])
    stream = _stream(task, data, settings["seed"], engine.device)
    load, began, cpu_began = os.getloadavg()[0], time.perf_counter(), time.process_time()
    engine.train()
    losses = [float(training.optimizer_step(engine, stream)[0]) for _ in range(steps)]
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    last = losses[-max(1, steps // 10) :]
    return {
        "metrics": evaluate(engine, data, getattr(data, settings["part"]), task),
        "unrelated_loss": evaluate(engine, data, data.unrelated, task)["loss"] if data.unrelated else None,
        "training_loss": _finite(math.fsum(last) / len(last)) if last else None,
        "trained_parameters": sum(p.numel() for p in engine.module.parameters() if _is_trained(engine, p)),
        "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2),
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        **_where(engine.device),
    }  # fmt: skip


def cost(task: Task, data: TaskData, settings: Settings) -> Result:
    """The method's speed beside full fine-tuning, the two in turn, and its peak on the longest training rows.

    CPU seconds of this process and not those of the clock: what else runs on the machine then counts less.
    """
    method, full = METHODS[settings["method"]["name"]], METHODS["full"]
    engines = {one.name: _engine(task, data, one, 1e-6, 1000, 0) for one in (full, method)}
    streams = {name: _stream(task, data, 0, engine.device) for name, engine in engines.items()}
    load = os.getloadavg()[0]
    cpu: dict[str, list[float]] = {name: [] for name in engines}
    clock: dict[str, list[float]] = {name: [] for name in engines}
    cycle = max(2, len(engines[method.name].hift.blocks)) if method.kind == "hift" else 2
    count = cycle * -(-_LEAST_TIMED // cycle)
    for number in range(1 + _ROUNDS):
        for name, engine in engines.items():
            engine.train()
            began, cpu_began = time.perf_counter(), time.process_time()
            for _ in range(count):
                training.optimizer_step(engine, streams[name])
            if number:  # in the first, state is made
                cpu[name].append((time.process_time() - cpu_began) / count)
                clock[name].append((time.perf_counter() - began) / count)
    return {
        "speed": median(a / b for a, b in zip(cpu[full.name], cpu[method.name], strict=True)),
        "step_cpu_s": cpu, "step_s": clock, "timed_steps": count,
        **_peak(engines[method.name], task, data, cycle),
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        **_where(engines[method.name].device),
    }  # fmt: skip


def _peak(engine: Any, task: Task, data: TaskData, cycle: int) -> Result:
    longest = data.collate(sorted(data.train, key=lambda row: len(row["input_ids"]))[-task.micro_batch :])
    batch = {key: value.to(engine.device) for key, value in longest.items()}
    with MemoryMeter(engine) as meter:
        for _ in range(cycle):
            training.optimizer_step(engine, iter([batch]))
    report = meter.gather()
    found = report.ranks[0].peak
    assert found is not None  # steps were made
    return {"peak": asdict(found), "peak_kind": report.kind, "peak_tokens": longest["input_ids"].shape[1]}


@torch.no_grad()
def evaluate(engine: Any, data: TaskData, rows: Sequence[TokenRow], task: Task) -> Result:
    """Mean loss and accuracy of what counts in the rows; None where the loss is not finite."""
    size = 4 * task.micro_batch if data.num_labels else task.micro_batch
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # little padding
    engine.eval()
    sums = []
    for start in range(0, len(rows), size):
        batch = {key: value.to(engine.device) for key, value in data.collate(rows[start : start + size]).items()}
        labels = batch.pop("labels")
        sums.append(sums_of(engine(**batch).logits, labels))
    loss, right, count = (math.fsum(column) for column in zip(*sums, strict=True))
    return {"loss": _finite(loss / count), "accuracy": right / count, "count": int(count)}


def _engine(task: Task, data: TaskData, method: Method | None, rate: float, steps: int, seed: int) -> Any:
    """A new model under a new engine; without a method, full fine-tuning's, of which no step is made."""
    torch.manual_seed(seed)
    model = load_network(task, data.num_labels)
    method = method or METHODS["full"]
    if method.kind == "lora":
        from peft import LoraConfig, get_peft_model

        kind = "CAUSAL_LM" if data.num_labels is None else "SEQ_CLS"  # the latter trains the head, too
        lora: Any = {"r": method.rank, "lora_alpha": 2 * (method.rank or 0), "target_modules": "all-linear"}
        model = get_peft_model(model, LoraConfig(task_type=kind, **lora))
    if method.kind == "last":
        for name, param in model.named_parameters():
            param.requires_grad_(any(re.search(pattern, name) for pattern in task.last))
    trained = [param for param in model.parameters() if param.requires_grad]
    config = _config(task, method, rate, steps)
    return hift_ds.initialize(model=model, model_parameters=trained, config=config)[0]


def _config(task: Task, method: Method, rate: float, steps: int) -> dict[str, Any]:
    adam = {name: OPTIMIZER[name] for name in ("betas", "eps", "weight_decay")}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": task.micro_batch,
        "gradient_clipping": OPTIMIZER["clip"],
        "optimizer": {"type": "AdamW", "params": {"lr": rate, **adam, "torch_adam": True, "fused": True}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": max(2, steps), "warmup_num_steps": max(1, round(OPTIMIZER["warmup"] * steps)),
                "warmup_type": "linear", "cos_min_ratio": 0.1,
            },
        },
        "zero_optimization": {"stage": 0},
        "steps_per_print": None,
    }  # fmt: skip
    if method.kind == "hift":
        keys = described(method)
        config["hift"] = {"enabled": True, **{key: keys[key] for key in ("layers_per_block", "always_active")}}
    return config


def _stream(task: Task, data: TaskData, seed: int, device: torch.device) -> Iterator[TokenRow]:
    groups: Any = in_groups(data, task.micro_batch, seed)
    return training.batches(groups, 1, seed, 0, device)


def _is_trained(engine: Any, param: torch.nn.Parameter) -> bool:
    return hasattr(engine, "hift") or param.requires_grad  # HiFT trains all, though one block alone has gradients now


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _where(device: torch.device) -> Result:
    found = provenance(device)
    versions = {**found["versions"], "peft": version("peft") if find_spec("peft") else None}
    return {**found, "versions": versions, "threads": torch.get_num_threads()}
