#!/usr/bin/env bash
# HiFT on the sample model and data: on the GPUs that are there, or on 2 CPU ranks.
set -euo pipefail
cd "$(dirname "$0")/.."
launcher=(deepspeed --quiet)
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" = 0 ]; then
    export DS_ACCELERATOR=cpu
    launcher+=(--num_accelerators 2)
    # Without AVX-512, 16-bit products take ten times as long as those in fp32.
    if ! python -c 'import sys, torch; sys.exit(not torch.backends.cpu.get_cpu_capability().startswith("AVX512"))'; then
        echo "this CPU has no fast 16-bit products: the demo trains in fp32"
        mkdir -p outputs
        sed '/"bf16"/d' launch/demo.json > outputs/demo_fp32.json
        set -- --deepspeed_config outputs/demo_fp32.json "$@"
    fi
fi
python -c 'from hift_ds.recipes.models import fetch_sample; fetch_sample()'
exec "${launcher[@]}" launch/train.py --hift --max_steps 144 --output_dir outputs/demo "$@"
