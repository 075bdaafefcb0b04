#!/usr/bin/env bash
# One card of 24 GB (3090, 4090, A10, L4), or a bigger one held to 22 GiB: bf16, rows of 512 to 2048 tokens, with and
# without activation checkpointing. 22, because a card of 24 GB has less than 24 GiB, and the cap counts torch's allocator
# alone: CUDA's context and libraries come on top.   MODEL=config.json launch/sweep_24gb.sh [options of compare.py]
set -euo pipefail
: "${MODEL:?name a config.json, a folder or a hub name: MODEL=config.json launch/sweep_24gb.sh}"
exec python "$(dirname "$0")/compare.py" --gpus 1 --stages 0 --precisions bf16 --gradient_checkpointing no yes \
    --seq_lens 512 1024 2048 --output_dir outputs/sweep_24gb "$@" \
    -- --random --model_name_or_path "$MODEL" --micro_batch 1 --gpu_memory_limit 22GiB
