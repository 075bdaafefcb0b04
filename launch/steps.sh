#!/usr/bin/env bash
# Llama-3.1-8B at 2 x 2048 tokens on three cards, bf16, loss in chunks, checkpointing: forecast peaks and modelled seconds
# of a step, as a row each of FILE (default: launch/results/DATE_steps.csv). Nothing in it is measured. 20 minutes.
set -euo pipefail
here="$(dirname "$0")"
file="${1:-$here/results/$(date +%F)_steps.csv}"
export PYTHONPATH="$here/..:$here/../kernels${PYTHONPATH:+:$PYTHONPATH}" # a checkout need not be installed
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
echo "card,blocks,update,master,moments,keep_layers,compiled,tile_mib,peak_gib,host_gib,compute_s,copies_s,exposed_s,step_s,tokens_per_s" > "$file"
row() { # card, layers in a block, update, masters, moments, layers that keep their activations, compiled: yes or no, MiB of a tile
    cat > "$work/config.json" <<END
{"bf16": {"enabled": true}, "gradient_clipping": 0.0, "optimizer": {"type": "AdamW"},
 "hift": {"enabled": true, "layers_per_block": $2, "update": "$3",
          "state": {"master": "$4", "moments": "$5"}}}
END
    echo "== $1, $2 layers per block, $4, $5, $6 layers keep their activations, compiled: $7, tiles of $8 MiB"
    local how=()
    [ "$6" = 0 ] || how=(--keep_layers "$6")
    [ "$7" = no ] || how+=(--compile)
    # 1: it does not fit
    python -m hift_ds.cli plan --model "$here/llama31_8b.json" --deepspeed_config "$work/config.json" --card "$1" "${how[@]}" \
        --micro_batch 2 --seq_len 2048 --gradient_checkpointing --loss chunked --loss_tile "$8MiB" --json "$work/plan.json" || [ $? = 1 ]
    python - "$work/plan.json" "$1,$(( $2 == 1 ? 34 : 1 )),$3,$4,$5,$6,$7,$8" >> "$file" <<'END'
import json, sys
plan = json.load(open(sys.argv[1]))
step = plan["modelled_step"]
figures = [plan["peak"] / 2**30, plan["host_per_rank"] / 2**30, step["compute"], step["copies"], step["exposed"], step["step"]]
print(sys.argv[2], *(f"{figure:.2f}" for figure in figures), round(step["tokens_per_second"]), sep=",")
END
}
for card in rtx4090 a6000 h200; do
    for blocks in "1 step" "100 backward"; do
        for form in "fp32 fp32" "split16 fp32" "split16 bf16" "split16 int8"; do
            # shellcheck disable=SC2086
            row "$card" $blocks $form 0 no 64
        done
        for form in "fp32 fp32" "split16 int8"; do
            # shellcheck disable=SC2086
            row "$card" $blocks $form 0 yes 64
        done
    done
done
# Tiles that are wide enough for its memory, and then as many layers as a card of 24 GiB has room for.
for compiled in no yes; do
    row rtx4090 1 backward fp32 fp32 0 $compiled 256
    row rtx4090 100 backward split16 int8 0 $compiled 256
    row rtx4090 1 backward fp32 fp32 7 $compiled 256
    row rtx4090 1 backward split16 int8 8 $compiled 256
    row rtx4090 100 backward split16 int8 4 $compiled 256
done
echo "wrote $file"
