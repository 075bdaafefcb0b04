"""What the cases on ranks share: a small model, deterministic batches, an engine, whole weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import constants
from transformers import LlamaConfig, LlamaForCausalLM

import hift_ds

# `make gpu` runs cases of one rank on the card.
DEVICE = torch.device(os.environ.get("HIFT_TEST_DEVICE", "cpu"))
VOCAB = 96
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# eps >= 1e-6: with 1e-8 a single element with |grad| < 1e-8 differs by 1e-4 between summation orders (design.md, 3).
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}}


def small_llama(seed: int = 0, layers: int = 4, tied: bool = False) -> LlamaForCausalLM:
    """Six units: embedding, four layers, norm + head; no slice is a multiple of 16, so padding is everywhere."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=52, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DEVICE)


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """As DeepSpeed casts a model: parameters only, buffers (rotary frequencies) stay fp32.

    DeepSpeed 0.18 casts buffers, too.
    """
    if not hasattr(constants, "BUFFER_DTYPE"):
        return model.to(dtype)
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model


def batch_of(step: int, micro: int, rank: int, seq: int = 12) -> dict[str, torch.Tensor]:
    """The batch of a rank at a micro step; the same in every process."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    ids = torch.randint(0, VOCAB, (2, seq), generator=generator).to(DEVICE)
    return {"input_ids": ids, "labels": ids}


def ds_config(stage: int, dtype: str = "fp32", hift: dict[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
    """A DeepSpeed config; `hift` = None leaves the section out. Clipping is off unless asked for."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": copy.deepcopy(ADAMW),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if hift is not None:
        config["hift"] = {"enabled": True, **hift}
    zero = extra.pop("zero_optimization", {})
    config["zero_optimization"].update(zero)
    return {**config, **extra}


def engine_of(config: dict[str, Any], model: torch.nn.Module | None = None, **kwargs: Any) -> Any:
    """An engine on a fresh small model."""
    return hift_ds.initialize(model=small_llama() if model is None else model, config=config, **kwargs)[0]


def run_steps(engine: Any, steps: int, start: int = 0) -> list[float]:
    """Optimizer steps with `batch_of`; returns this rank's loss of each micro step."""
    rank, losses = dist.get_rank(), []
    for step in range(start, start + steps):
        for micro in range(engine.gradient_accumulation_steps()):
            loss = engine(**batch_of(step, micro, rank)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of every whole parameter. Collective at stage 3."""
    params = dict(engine.module.named_parameters())
    sharded = [param for param in params.values() if hasattr(param, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded):  # all at once: one by one takes eight times as long
        return {name: param.detach().clone() for name, param in params.items()}


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over all parameters."""
    assert left.keys() == right.keys()
    return max((left[name].float() - right[name].float()).abs().max().item() for name in left)


@contextmanager
def fp16_allowed() -> Iterator[None]:
    """DeepSpeed refuses fp16 on a CPU without fp16 instructions; torch computes there all the same, only slowly."""
    accelerator = get_accelerator()
    if accelerator.is_fp16_supported():
        yield
        return
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported
