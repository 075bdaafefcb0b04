#!/usr/bin/env bash
# LLaMA-2-7B shapes with random weights on one card: HiFT in bf16 and fp32, 6 x 512 and 1 x 1024 tokens, with and without
# activation checkpointing, held to 46, 22 and 14 GiB for cards of 48, 24 and 16 GB (why: sweep_24gb.sh); then full
# fine-tuning without a limit. For a card of 140 GB (full fine-tuning takes 126 GiB) and a host with 96 GB free.
#   launch/sweep_goals.sh [options of compare.py]
set -euo pipefail
here="$(dirname "$0")"
model="${MODEL:-$here/llama2_7b.json}"
sweep() { # name, micro batch, tokens, precision, limit or none, methods
    local cap=()
    [ "$5" = none ] || cap=(--gpu_memory_limit "$5")
    python "$here/compare.py" --gpus "${GPUS:-1}" --stages 0 --methods $6 --precisions "$4" --gradient_checkpointing no yes --seq_lens "$3" \
        --output_dir "${OUTPUT:-outputs/goals}/$1" "${@:7}" -- --random --model_name_or_path "$model" --micro_batch "$2" "${cap[@]}"
}
limits=(46GiB 22GiB 14GiB none)
[ "${LIMITS:-yes}" = yes ] || limits=(none) # a CPU has no allocator to cap
for limit in "${limits[@]}"; do
    methods=hift
    [ "$limit" = none ] && methods="hift full"
    for precision in bf16 fp32; do
        sweep "${precision}_6x512_$limit" 6 "${TOKENS_6:-512}" "$precision" "$limit" "$methods" "$@"
        sweep "${precision}_1x1024_$limit" 1 "${TOKENS_1:-1024}" "$precision" "$limit" "$methods" "$@"
    done
done
