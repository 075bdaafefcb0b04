#!/usr/bin/env bash
# Held-out loss by examples and by seconds: full fine-tuning (DeepSpeed's engine), and HiFT with updates in backward and
# 1, 4, 8 and 31 blocks. SmolLM2-135M on GSM8K, ZeRO-2, fp32, 2 CPU ranks. Each at the best of its rates (one block at
# full fine-tuning's); HiFT then once more, at that rate, for as many seconds as full fine-tuning took.
#     launch/curves.sh DATA OUT     # DATA has gsm8k_{train,test}.jsonl; stop and start again at will
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
: "${2:?the output folder is missing: launch/curves.sh DATA OUT}"
data="$1" out="$2" steps="${STEPS:-62}" every="${EVAL_EVERY:-10}" rows="${ROWS:-32}" rounds="${ROUNDS:-2}"
export PYTHONPATH="$here/..:$here/../kernels${PYTHONPATH:+:$PYTHONPATH}" DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$out/data" "$out/runs"
cp "$data/gsm8k_train.jsonl" "$out/data/train.jsonl"
head -n "$rows" "$data/gsm8k_test.jsonl" > "$out/data/test.jsonl"
cat > "$out/config.json" <<'END'
{"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": 2}, "steps_per_print": null,
 "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01, "torch_adam": true, "fused": true}},
 "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 100, "warmup_num_steps": 6,
                                                    "warmup_type": "linear", "cos_min_ratio": 0.1}}}
END
same=(--deepspeed_config "$out/config.json" --dataset "$out/data" --seq_len 192)

run() { # full or LAYERS of a block, RATE, STEPS
    local folder="$out/runs/$1,$2,$3" hift=(--hift --hift_layers_per_block "$1" --hift_update backward)
    [ ! -f "$folder/summary.json" ] || return 0
    [ "$1" != full ] || hift=()
    echo "== $1, rate $2, $3 steps"
    deepspeed --quiet --num_accelerators 2 "$here/train.py" "${same[@]}" --lr "$2" --max_steps "$3" --eval_every "$every" \
        --answer_tokens 1 --output_dir "$folder" "${hift[@]}" < /dev/null
    rm -rf "$folder/model" # half a gigabyte
}

# Smaller blocks, larger rates.
: "${RATES_FULL:=3e-5 1e-4 3e-4}" "${RATES_8:=1e-4 3e-4 1e-3}" "${RATES_4:=1e-4 3e-4 1e-3}" "${RATES_1:=3e-4 1e-3 3e-3}"
for rate in $RATES_FULL; do
    run full "$rate" "$steps"
done
for layers in 8 4 1; do
    rates="RATES_$layers"
    for rate in ${!rates}; do
        run "$layers" "$rate" "$steps"
    done
done

# Step times, all in turn: they say how many steps fit into full fine-tuning's seconds.
python "$here/compare.py" --methods full offload hift --stages 2 --precisions ${PRECISIONS:-fp32} --gpus 2 --seq_lens 192 \
    --updates backward --layers_per_block 1 4 8 100 --rounds "$rounds" --deepspeed_config "$out/config.json" \
    --output_dir "$out/speed" -- --random --model_name_or_path smollm2-135m ${SPEED_STEPS:+--max_steps "$SPEED_STEPS"}

python -m hift_ds.recipes.curves "$out" > "$out/next.txt" # one block at full fine-tuning's rate, and all for its seconds
while read -r layers rate count; do
    run "$layers" "$rate" "$count"
done < "$out/next.txt"
python -m hift_ds.recipes.curves "$out" --draw
