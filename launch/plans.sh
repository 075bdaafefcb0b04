#!/usr/bin/env bash
# The forecasts of docs/memory.md for a 7B Llama on one card, as JSON files in DIR (default: launch/results/DATE_plans).
set -euo pipefail
here="$(dirname "$0")"
folder="${1:-$here/results/$(date +%F)_plans}"
mkdir -p "$folder"
export PYTHONPATH="$here/..:$here/../kernels${PYTHONPATH:+:$PYTHONPATH}" # a checkout need not be installed
plan() { # name, options
    echo "== $1"
    python -m hift_ds.cli plan --model "$here/llama2_7b.json" --json "$folder/llama2_7b_$1.json" "${@:2}"
}
plan bf16_1x1024_checkpointing --precision bf16 --micro_batch 1 --seq_len 1024 --gradient_checkpointing
# The others know of no card, so that the ring is 128 MiB; by default a card of this size gets a whole block's.
plan bf16_1x1024_checkpointing_24gib --precision bf16 --micro_batch 1 --seq_len 1024 --gradient_checkpointing --gpu_memory 24GiB
plan bf16_1x1024 --precision bf16 --micro_batch 1 --seq_len 1024
plan bf16_6x512_checkpointing --precision bf16 --micro_batch 6 --seq_len 512 --gradient_checkpointing
plan bf16_6x512 --precision bf16 --micro_batch 6 --seq_len 512 --plot "$folder/llama2_7b_bf16_6x512.png"
plan bf16_6x512_eager --precision bf16 --micro_batch 6 --seq_len 512 --attn_implementation eager
plan fp32_1x1024_checkpointing --precision fp32 --micro_batch 1 --seq_len 1024 --gradient_checkpointing
plan fp32_6x512 --precision fp32 --micro_batch 6 --seq_len 512
