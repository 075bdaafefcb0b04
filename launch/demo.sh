#!/usr/bin/env bash
# HiFT, then full fine-tuning, on the same examples: on the GPUs that are there, or on 2 CPU ranks. Ends in a table.
# Options go to both runs. Which rates and blocks were tried: docs/speed.md, "The demo".
set -euo pipefail
cd "$(dirname "$0")/.."
launcher=(deepspeed --quiet)
# One start of Python: GPUs, and whether 16-bit products are fast. Without AVX-512 they take ten times as long as in fp32.
found=$(python - <<'PY'
import torch
from hift_ds.recipes.models import fetch_sample
fetch_sample()
print(torch.cuda.device_count(), torch.backends.cpu.get_cpu_capability().startswith("AVX512"))
PY
)
read -r gpus fast <<< "${found##*$'\n'}"
if [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu
    launcher+=(--num_accelerators 2)
    mkdir -p outputs
    # Without ZeRO a step of full fine-tuning takes two thirds of the time here; HiFT's is as long with it.
    sed 's/"stage": 2/"stage": 0/' launch/demo.json > outputs/demo.json
    if [ "$fast" = False ]; then
        echo "This CPU has no fast 16-bit products: the demo trains in fp32."
        sed -i '/"bf16"/d' outputs/demo.json
    fi
    set -- --deepspeed_config outputs/demo.json "$@"
fi
same=(--dataset hift-facts --micro_batch 2 --max_steps 16 --seq_len 64 --answers 12 --answer_tokens 12 --measure_memory)
echo "1. HiFT: one block of layers a step"
"${launcher[@]}" launch/train.py --hift --hift_layers_per_block 8 --lr 1e-3 --output_dir outputs/demo/hift "${same[@]}" "$@"
echo "2. Full fine-tuning: all layers at each step"
"${launcher[@]}" launch/train.py --lr 3e-4 --output_dir outputs/demo/full "${same[@]}" "$@"
python -m hift_ds.recipes.demo outputs/demo
