#!/usr/bin/env bash
# Four A6000: every ZeRO stage on 1, 2 and 4 of them.   MODEL=config.json launch/sweep_four_a6000.sh [options of compare.py]
set -euo pipefail
: "${MODEL:?name a config.json, a folder or a hub name: MODEL=config.json launch/sweep_four_a6000.sh}"
exec python "$(dirname "$0")/compare.py" --gpus 1 2 4 --stages 0 1 2 3 --precisions bf16 fp32 \
    --seq_lens 512 --output_dir outputs/sweep_four_a6000 "$@" \
    -- --random --model_name_or_path "$MODEL" --micro_batch 6 --gpu_memory_limit 46GiB
