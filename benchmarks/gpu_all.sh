#!/usr/bin/env bash
# Everything that needs a CUDA GPU, the most valuable first, in at most nine minutes: benchmarks/gpu_all.sh [FOLDER]
#
# A machine with torch, transformers and pytest is enough; where FlagEmbedding, datasets and sentence-transformers are missing,
# the comparison with them says so and the rest goes on. Each part writes its file into FOLDER (benchmarks/results) at once.
# MODEL is a folder with XLM-R's tokenizer (models/small-encoder), DATA a training file (the Korean sample).
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
model=${MODEL:-models/small-encoder}
data=${DATA:-data/samples/ko/train.jsonl}
shape=$(mktemp -d)
trap 'rm -rf "$shape"' EXIT
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
mkdir -p "$results"
failed=0

# part NAME SECONDS COMMAND…: the output goes to FOLDER/NAME.log, too; a part that fails does not stop the others.
part() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    if timeout "$limit" "$@" 2>&1 | tee "$results/$name.log" | grep -v '^$' | tail -n 25; then
        echo "== $name: done in $((SECONDS - start)) s"
    else
        echo "== $name: FAILED after $((SECONDS - start)) s (limit $limit s)"
        failed=1
    fi
}

part gpu_tests 100 python3 -m pytest -q -m gpu -p no:cacheprovider tests/moe tests/encoder tests/train
part gpu_model 60 python3 benchmarks/random_model.py "$shape" --tokenizer "$model"
part training_gpu 180 python3 benchmarks/training.py --model "$shape" --data "$data" --output "$results/training_gpu.json" \
    --batch 32 --group 5 --query_max_len 64 --passage_max_len 512 --warmup 3 --steps 8 --rounds 2 \
    --only "clpl_moe, contrastive, dense, all trained" "FlagEmbedding M3" "sentence-transformers MNRL" \
    "clpl_moe, CLPL, only experts trained"
part many_gpus 60 python3 benchmarks/many_gpus.py --model "$shape" --data "$data" --output "$results/many_gpus.json" --steps 3 \
    --launchers ddp fsdp2 zero2
part gpu 80 python3 benchmarks/gpu.py --queries 64 --repeats 5 --output "$results/gpu.json"
part encoding_gpu 60 python3 benchmarks/encoding.py --model "$shape" --pooling cls --rounds 3 --output "$results/encoding_gpu.json"
exit $failed
