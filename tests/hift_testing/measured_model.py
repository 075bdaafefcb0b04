"""The model, batch and buckets whose memory is measured on ranks and forecast by the planner."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROWS, SEQ = 4, 64
LLAMA = dict(
    vocab_size=1000, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
# Small enough that a layer's gradients take several buckets, and that stage 3 must let parameters go and fetch ahead.
ZERO = {
    "reduce_bucket_size": 60_000, "allgather_bucket_size": 60_000, "stage3_prefetch_bucket_size": 60_000,
    "stage3_max_live_parameters": 200_000, "stage3_max_reuse_distance": 100_000,
    "stage3_param_persistence_threshold": 200,
}  # fmt: skip


def measured_llama(**keys: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**LLAMA, use_cache=False, **keys))


def tokens_of(seed: int, rows: tuple[int, int] = (ROWS, SEQ)) -> dict[str, torch.Tensor]:
    """A batch of so many rows and tokens."""
    ids = torch.randint(0, LLAMA["vocab_size"], rows, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}
