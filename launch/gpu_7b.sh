#!/usr/bin/env bash
# Models of 7 and 8 billion parameters with random weights on one card, without ZeRO: memory beside the forecast, the time of a
# step of whole cycles, and what of a traced cycle was copies of state that nothing hid.   launch/gpu_7b.sh [RUN ...]
#   int8 exact wide fp32       LLaMA-2-7B, a layer a block; all four without a name
#   layer_exact layer_int8     Llama-3.1-8B at 2 x 2048, loss in chunks, recomputed activations, a layer a block
#   whole_exact whole_int8     the same, all of full fine-tuning in one block, updated in backward
#   layer_compiled whole_compiled   layer_exact and whole_int8 with --compile (a C++ compiler, and a minute more)
#   eight_layer eight_whole eight_full eight_offload   8 of the 32 layers: HiFT, and DeepSpeed's full fine-tuning with torch's
#                              fused AdamW, or with ZeRO-2, offload_optimizer and its DeepSpeedCPUAdam (compiled at first)
# Needs 90 GiB of host memory (30 for int8, 54 for fp32, 32 for eight). 16 CPU cores and PCIe 5: two minutes a run with STEPS=102
# (three cycles of a layer a block, one of them timed) and STEPS=14 for whole_* and eight_*, which have two steps a cycle.
# OUTPUT: where configs and results go. STEPS: 136 if not given. MODEL: another config.json, for all runs. TOKENS: of a row.
# LOSS_TILE: of the loss in chunks, 64MiB if not given.
# LIMITS=no: on a CPU, which has no allocator to cap and nothing to trace, and no fused kernels for int8.
set -euo pipefail
here="$(dirname "$0")"
output="${OUTPUT:-outputs/gpu_7b}"
mkdir -p "$output"
measure() { # name, changes of the config, rows, tokens, cap of the card's memory or none, config.json of the model, more options
    local watch=(--trace)
    [ "$5" = none ] || watch+=(--gpu_memory_limit "$5")
    [ "${LIMITS:-yes}" = yes ] || watch=()
    python3 - "$here/demo.json" "$output/$1_config.json" "$2" <<'PY'
import json, sys
base, target, changes = sys.argv[1:]
with open(base) as file:
    config = json.load(file) | {"zero_optimization": {"stage": 0}}
config |= json.loads(changes)
with open(target, "w") as file:
    json.dump({key: value for key, value in config.items() if value is not None}, file, indent=1)
PY
    python3 "$here/benchmark_memory.py" --random --model_name_or_path "${MODEL:-$6}" "${@:7}" \
        --deepspeed_config "$output/$1_config.json" --max_steps "${STEPS:-136}" --micro_batch "$3" --seq_len "$4" "${watch[@]}" \
        --results "$output/$1.json"
}
llama2() { measure "$@" "$here/llama2_7b.json" --hift; }
llama31() { # run, changes of the config, cap, more options
    measure "llama31_2x2048_$1" "{\"gradient_clipping\": 0.0, $2}" 2 "${TOKENS:-2048}" "$3" "${model:-$here/llama31_8b.json}" \
        --loss chunked --loss_tile "${LOSS_TILE:-64MiB}" --gradient_checkpointing "${@:4}"
}
eight() {
    local model="$output/llama31_8b_8layers.json"
    sed 's/"num_hidden_layers": 32/"num_hidden_layers": 8/' "$here/llama31_8b.json" > "$model"
    llama31 "$@"
}
unknown() {
    echo "RUN $1: no such run; $here/gpu_7b.sh names them at its top" >&2
    exit 2
}
block='"enabled": true, "layers_per_block": 1'
whole='"enabled": true, "layers_per_block": 1000'
backward='"update": "backward"'
compact='"state": {"master": "split16", "moments": "int8"}'
offload='"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": true}},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.01}}'
runs=("$@")
[ $# -gt 0 ] || runs=(int8 exact wide fp32)
for run in "${runs[@]}"; do
    case "$run" in
        int8) llama2 bf16_1x1024_22gib_split16_int8 "{\"hift\": {$block, $compact}}" 1 "${TOKENS:-1024}" 22GiB ;;
        exact) llama2 bf16_1x1024_22gib "{\"hift\": {$block}}" 1 "${TOKENS:-1024}" 22GiB ;;
        wide) llama2 bf16_6x512_46gib "{\"hift\": {$block}}" 6 "${TOKENS:-512}" 46GiB ;;
        fp32) llama2 fp32_1x512_46gib "{\"hift\": {$block}, \"bf16\": null}" 1 "${TOKENS:-512}" 46GiB ;;
        layer_exact) llama31 "$run" "\"hift\": {$block, $backward}" 22GiB --hift ;;
        layer_int8) llama31 "$run" "\"hift\": {$block, $backward, $compact}" 22GiB --hift ;;
        whole_exact) llama31 "$run" "\"hift\": {$whole, $backward}" 22GiB --hift ;;
        whole_int8) llama31 "$run" "\"hift\": {$whole, $backward, $compact}" 22GiB --hift ;;
        layer_compiled) llama31 "$run" "\"hift\": {$block, $backward}" 22GiB --hift --compile ;;
        whole_compiled) llama31 "$run" "\"hift\": {$whole, $backward, $compact}" 22GiB --hift --compile ;;
        eight_layer) eight "$run" "\"hift\": {$block, $backward}" none --hift ;;
        eight_whole) eight "$run" "\"hift\": {$whole, $backward}" none --hift ;;
        eight_full) eight "$run" '"zero_optimization": {"stage": 0}' none ;;
        eight_offload) eight "$run" "$offload" none ;;
        *) unknown "$run" ;;
    esac
done
