#!/usr/bin/env bash
# From a fresh clone to a model that retrieves better, on a CPU: environment, small encoder, training, evaluation.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

encoder=models/small-encoder
run=runs/quickstart
if [ ! -d "$encoder" ]; then
    python -m clpl_moe.small_encoder --output "$encoder"
fi
if [ -d "$run" ]; then
    echo "$run exists: continuing it (remove the folder to start again)"
    python -m clpl_moe.train --config configs/quickstart.yaml --resume_from_checkpoint true
else
    python -m clpl_moe.train --config configs/quickstart.yaml
fi
echo
echo "Korean dev questions, before and after:"
python -m clpl_moe.evaluate --model "$encoder" "$run" --collection data/samples --languages ko --split dev \
    --query_max_len 64 --passage_max_len 160 --output results/quickstart --overwrite true
