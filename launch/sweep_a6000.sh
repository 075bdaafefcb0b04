#!/usr/bin/env bash
# One A6000 (48 GB), or a bigger card held to 46 GiB (why: sweep_24gb.sh): a model's config.json (or folder) with random
# weights, in bf16 and fp32, with and without activation checkpointing.
#   MODEL=config.json launch/sweep_a6000.sh [options of compare.py]
set -euo pipefail
: "${MODEL:?name a config.json, a folder or a hub name: MODEL=config.json launch/sweep_a6000.sh}"
exec python "$(dirname "$0")/compare.py" --gpus 1 --stages 0 --precisions bf16 fp32 --gradient_checkpointing no yes \
    --seq_lens 512 --output_dir outputs/sweep_a6000 "$@" \
    -- --random --model_name_or_path "$MODEL" --micro_batch 6 --gpu_memory_limit 46GiB
