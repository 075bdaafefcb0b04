#!/usr/bin/env python3
"""Tokens per second of HiFT over full fine-tuning: same model, ranks, ZeRO stage and batches, in turn in one run.

    deepspeed --num_accelerators 2 launch/benchmark_speed.py     # the sample model, ZeRO-2
    deepspeed launch/benchmark_speed.py --stage 3 --layers_per_block 4 --cycles 3

Full fine-tuning is DeepSpeed's own engine and optimizer. Each HiFT step is followed by a full step on the same batch,
so that a drift of the machine's speed falls on both; on CUDA each cycle by a cycle, because copies of HiFT's state go
on after a step and would be hidden by the other's. Writes a dated file into launch/results/.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]  # a checkout need not be installed


def main() -> int:
    args = _arguments()
    from hift_ds.recipes.setup import prepare_process

    prepare_process(verbose=False)
    import hift_ds

    hift_ds.init_distributed()
    from deepspeed import comm as dist
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    counter = Traffic(dist)
    hift, full = build(args, hift=True), build(args, hift=False)
    rows = measure(args, hift, full, counter)
    if dist.get_rank() == 0:
        report(args, hift, rows)
    dist.barrier()
    return 0


def build(args: argparse.Namespace, hift: bool) -> Any:
    """An engine on a fresh copy of the model. Collective."""
    import torch

    import hift_ds
    from hift_ds.recipes.models import load_model

    params = {"lr": 1e-5, "weight_decay": 0.01, "torch_adam": args.full_optimizer == "torch"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": params},
        "zero_optimization": {
            "stage": args.stage,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "steps_per_print": None,
    }
    if args.dtype != "fp32":
        config[args.dtype] = {"enabled": True}
    if hift:
        config["hift"] = {"enabled": True, "layers_per_block": args.layers_per_block}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = load_model(args.model_name_or_path, dtype=dtype)
    model.config.use_cache = False
    return hift_ds.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def measure(args: argparse.Namespace, hift: Any, full: Any, counter: Traffic) -> list[dict[str, Any]]:
    """One row per step; the first cycle warms up and is left out. Collective."""
    import torch
    from deepspeed import comm as dist
    from deepspeed.accelerator import get_accelerator

    vocabulary, rows = hift.module.config.vocab_size, []
    cycle = len(hift.hift.blocks)
    turn = cycle if hift.device.type == "cuda" else 1
    for first in range(0, cycle * (args.cycles + 1), turn):
        steps = [{"step": step} for step in range(first, first + turn)]
        for name, engine in (("hift", hift), ("full", full)):
            get_accelerator().synchronize()  # once a turn: the copies that the other has left
            for row in steps:
                generator = torch.Generator().manual_seed(1000 * row["step"] + dist.get_rank())
                ids = torch.randint(0, vocabulary, (args.micro_batch, args.seq_len), generator=generator)
                ids = ids.to(hift.device)
                if engine is hift:
                    row["block"] = hift.hift.active_block
                dist.barrier()
                counter.bytes, start = 0, time.perf_counter()
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                engine.step()
                dist.barrier()  # of NCCL it waits for the current stream alone
                row[f"{name}_s"] = time.perf_counter() - start
                row[f"{name}_bytes"] = counter.bytes
        rows += steps if first >= cycle else []
    return rows


class Traffic:
    """Bytes that this rank hands to collectives (an all-gather or reduce-scatter: its whole buffer)."""

    def __init__(self, dist: Any) -> None:
        self.bytes = 0
        for name, position in (("all_reduce", 0), ("reduce_scatter_tensor", 1), ("all_gather_into_tensor", 0),
                               ("reduce", 0), ("broadcast", 0)):  # fmt: skip
            setattr(dist, name, self._counting(getattr(dist, name), position))

    def _counting(self, function: Any, position: int) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = args[position] if len(args) > position else next(iter(kwargs.values()))
            self.bytes += tensor.nbytes
            return function(*args, **kwargs)

        return counted


def report(args: argparse.Namespace, hift: Any, rows: list[dict[str, Any]]) -> None:
    """Prints the ratios and writes them with every row."""
    from statistics import mean, median

    from hift_ds.recipes.results import provenance, write_results

    blocks = hift.hift.blocks
    tokens = args.micro_batch * args.seq_len * hift.dp_world_size
    mean_s = {name: mean(row[f"{name}_s"] for row in rows) for name in ("hift", "full")}
    per_block = [[row["full_s"] / row["hift_s"] for row in rows if row["block"] == block.index] for block in blocks]
    result = {
        **provenance(hift.device),
        "model": args.model_name_or_path,
        "parameters": sum(block.numel for block in blocks),
        "stage": args.stage,
        "ranks": hift.dp_world_size,
        "dtype": args.dtype,
        "micro_batch": args.micro_batch,
        "sequence": args.seq_len,
        "blocks": len(blocks),
        "full fine-tuning's optimizer": "torch AdamW" if args.full_optimizer == "torch" else "DeepSpeed FusedAdam",
        "steps": len(rows),
        "tokens_per_s_hift": tokens / mean_s["hift"],
        "tokens_per_s_full": tokens / mean_s["full"],
        "speed_ratio": mean_s["full"] / mean_s["hift"],
        "speed_ratio_per_block_median": [round(median(ratios), 3) for ratios in per_block],
        "bytes_per_step_hift": mean(row["hift_bytes"] for row in rows),
        "bytes_per_step_full": mean(row["full_bytes"] for row in rows),
    }
    result["bytes_ratio"] = result["bytes_per_step_hift"] / result["bytes_per_step_full"]
    setting = f"zero{args.stage}_{args.dtype}_{result['ranks']}ranks_{len(blocks)}blocks_{args.full_optimizer}"
    path = Path(args.results_dir) / f"{result['date']}_speed_{setting}.json"
    write_results(path, {**result, "rows": rows})
    for key, value in result.items():
        print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
    print(f"wrote {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--model_name_or_path", default="smollm2-135m")
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2, 3))
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--layers_per_block", type=int, default=1)
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--cycles", type=int, default=1, help="measured cycles, after one that warms up")
    parser.add_argument("--full_optimizer", default="deepspeed", choices=("deepspeed", "torch"),
                        help="deepspeed compiles its fused Adam at the first run (needs a C++ compiler)")  # fmt: skip
    parser.add_argument("--results_dir", default=str(HERE / "results"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
