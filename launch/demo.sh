#!/usr/bin/env bash
# HiFT on the sample model and data: on the GPUs that are there, or on 2 CPU ranks.
set -euo pipefail
cd "$(dirname "$0")/.."
launcher=(deepspeed --quiet)
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" = 0 ]; then
    export DS_ACCELERATOR=cpu
    launcher+=(--num_accelerators 2)
fi
python -c 'from hift_ds.recipes.models import fetch_sample; fetch_sample()'
exec "${launcher[@]}" launch/train.py --hift --max_steps 144 --output_dir outputs/demo "$@"
