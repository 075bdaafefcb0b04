"""From the command line to what a run needs: model, tokenizer, data, DeepSpeed config; and how a run fails."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

from hift_ds.recipes.arguments import build_ds_config

EPOCHS = 3  # of a run without --max_steps
FAILED = 2


@dataclass
class Run:
    """What one training run works with."""

    model: Any
    tokenizer: Any
    data: Any
    ds_config: dict[str, Any]
    micro_batch: int
    max_steps: int


def prepare_process(verbose: bool) -> None:
    """Threads and log levels of this rank, before torch and DeepSpeed are imported."""
    world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE") or
                os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1)  # fmt: skip
    # Ranks that each use every core of a machine slow each other down.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        os.environ.setdefault("DS_LOG_LEVEL", "warning")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")


def load_run(args: argparse.Namespace) -> Run:
    """Loads everything; the same on every rank.

    Raises:
        ValueError, TypeError, FileNotFoundError: In one sentence, what is wrong with an argument, the config, the data.
    """
    import torch
    from deepspeed import comm as dist

    from hift_ds.config import HiFTConfig
    from hift_ds.recipes.datasets import load_text_dataset
    from hift_ds.recipes.models import load_model, load_tokenizer

    if not args.verbose:
        _quiet()
    ds_config = build_ds_config(args)
    HiFTConfig.from_ds_config(ds_config)  # a typo is found before minutes of loading
    tokenizer = load_tokenizer(args.model_name_or_path)
    data = load_text_dataset(args.dataset, tokenizer, seq_len=args.seq_len, pack=args.pack, seed=args.seed)
    micro_batch = ds_config.get("train_micro_batch_size_per_gpu") or 1
    accumulation = ds_config.get("gradient_accumulation_steps") or 1
    per_step = micro_batch * accumulation * dist.get_world_size()
    max_steps = args.max_steps or max(1, EPOCHS * len(data.train) // per_step)
    ds_config = build_ds_config(args, max_steps)
    zero3 = ds_config.get("zero_optimization", {}).get("stage") == 3
    kept = _zero3_loading(ds_config, dist.get_world_size()) if zero3 else None
    dtype = torch.float32
    for key, candidate in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if ds_config.get(key, {}).get("enabled"):
            dtype = candidate
    model = load_model(
        args.model_name_or_path, dtype=dtype, attn_implementation=args.attn_implementation, zero3=kept is not None
    )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    return Run(model, tokenizer, data, ds_config, micro_batch, max_steps)


def _zero3_loading(ds_config: dict[str, Any], world: int) -> Any:
    """While the returned object lives, from_pretrained partitions each parameter as it is created."""
    from transformers.integrations import HfDeepSpeedConfig

    micro, accumulation = ds_config.get("train_micro_batch_size_per_gpu", 1), ds_config.get("gradient_accumulation_steps", 1)
    return HfDeepSpeedConfig({**ds_config, "train_batch_size": micro * accumulation * world})


def _quiet() -> None:
    from deepspeed.utils import logger
    from transformers.utils import logging as hf_logging

    logger.setLevel(logging.WARNING)
    hf_logging.set_verbosity_error()


def fail(error: Exception, verbose: bool) -> int:
    """Prints an error as one sentence (with `verbose`, where it came from); returns the exit code."""
    if verbose:
        traceback.print_exception(error)
    print(f"[rank {os.environ.get('RANK', '0')}] error: {error}", file=sys.stderr, flush=True)
    return FAILED
