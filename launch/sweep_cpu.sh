#!/usr/bin/env bash
# Every stage and precision, HiFT beside full fine-tuning, with the sample model on 2 CPU ranks (about half an hour on
# 2 cores). Options are those of compare.py.
set -euo pipefail
export DS_ACCELERATOR=cpu PYTHONPATH="$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH}"
python -c 'from hift_ds.recipes.models import fetch_sample; fetch_sample()'
exec python "$(dirname "$0")/compare.py" --gpus 2 --seq_lens 64 --layers_per_block 8 --cell_timeout 900 "$@" \
    -- --micro_batch 1 --max_steps 12 --skip_evaluation
