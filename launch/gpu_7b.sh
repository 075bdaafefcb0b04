#!/usr/bin/env bash
# LLaMA-2-7B shapes with random weights on one card, without ZeRO, a layer a block: memory beside the forecast, and the time
# of a step of whole cycles. Four runs, or those named: int8 exact wide fp32.   launch/gpu_7b.sh [RUN ...]
# By name alone, Llama-3.1-8B at 2 x 2048, loss in chunks, recomputed activations: layer_exact layer_int8, a layer a block;
# whole_exact whole_int8, all of full fine-tuning in one block, updated in backward (90 GiB of host memory, 30 for int8).
# Needs 86 GiB of host memory (29 for int8, 54 for fp32). 16 CPU cores and PCIe 5: under two minutes a run.
# OUTPUT: where configs and results go. STEPS: 102 are three cycles, one of them timed. LIMITS=no: a CPU has no allocator to cap.
set -euo pipefail
here="$(dirname "$0")"
output="${OUTPUT:-outputs/gpu_7b}"
mkdir -p "$output"
measure() { # name, changes of the config, micro batch, tokens, cap of the card's memory
    local cap=(--gpu_memory_limit "$5")
    [ "${LIMITS:-yes}" = yes ] || cap=()
    python3 - "$here/demo.json" "$output/$1_config.json" "$2" <<'PY'
import json, sys
base, target, changes = sys.argv[1:]
with open(base) as file:
    config = json.load(file) | {"zero_optimization": {"stage": 0}}
config |= json.loads(changes)
with open(target, "w") as file:
    json.dump({key: value for key, value in config.items() if value is not None}, file, indent=1)
PY
    python3 "$here/benchmark_memory.py" --hift --random --model_name_or_path "${MODEL:-$here/${6:-llama2_7b}.json}" "${@:7}" \
        --deepspeed_config "$output/$1_config.json" --max_steps "${STEPS:-136}" --micro_batch "$3" --seq_len "$4" "${cap[@]}" \
        --results "$output/$1.json"
}
unknown() {
    echo "RUN $1: no such run; name int8, exact, wide, fp32, layer_exact, layer_int8, whole_exact or whole_int8" >&2
    exit 2
}
block='"enabled": true, "layers_per_block": 1'
compact='"state": {"master": "split16", "moments": "int8"}'
runs=("$@")
[ $# -gt 0 ] || runs=(int8 exact wide fp32)
for run in "${runs[@]}"; do
    case "$run" in
        int8) measure bf16_1x1024_22gib_split16_int8 "{\"hift\": {$block, $compact}}" 1 "${TOKENS:-1024}" 22GiB ;;
        exact) measure bf16_1x1024_22gib "{\"hift\": {$block}}" 1 "${TOKENS:-1024}" 22GiB ;;
        wide) measure bf16_6x512_46gib "{\"hift\": {$block}}" 6 "${TOKENS:-512}" 46GiB ;;
        fp32) measure fp32_1x512_46gib "{\"hift\": {$block}, \"bf16\": null}" 1 "${TOKENS:-512}" 46GiB ;;
        layer_*|whole_*)
            blocks="$block, \"update\": \"backward\""
            [ "${run%%_*}" = layer ] || blocks='"enabled": true, "layers_per_block": 1000, "update": "backward"'
            case "${run##*_}" in exact) state="" ;; int8) state=", $compact" ;; *) unknown "$run" ;; esac
            measure "llama31_2x2048_22gib_$run" "{\"gradient_clipping\": 0.0, \"hift\": {$blocks$state}}" 2 "${TOKENS:-2048}" \
                22GiB llama31_8b --loss chunked --gradient_checkpointing ;;
        *) unknown "$run" ;;
    esac
done
