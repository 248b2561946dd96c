#!/usr/bin/env bash
# A SQuAD-shaped file through the whole way, with the small encoder: scripts/squad_experiment.sh LANGUAGE FILE.json [option value ...]
# Further options go to training; after a stop the same command goes on. All is in runs/squad_LANGUAGE, which belongs to one file:
# another one is refused. Results, nDCG on the dev articles before and after: results.json there, or the file that OUTPUT names.
set -euo pipefail
language=$1 file=$(realpath "$2")
shift 2
case "${OUTPUT:-}" in
    '' | /*) ;;
    *) OUTPUT="$PWD/$OUTPUT" ;; # seen from where the caller is
esac
cd "$(dirname "$0")/.."
work=runs/squad_$language
fail() {
    echo "error: $1" >&2
    exit 2
}
[ -f "$file" ] || fail "$file: no such file"
digest=$(sha256sum <"$file" | cut -d ' ' -f 1)
if [ -z "$(ls -A "$work" 2>/dev/null)" ]; then
    mkdir -p "$work"
    echo "$digest" >"$work/source.sha256"
fi
# Also where nothing says which file it was.
[ "$(cat "$work/source.sha256" 2>/dev/null)" = "$digest" ] ||
    fail "$PWD/$work: holds the work on another file than $file (source.sha256 differs or is missing); move or remove the folder"
. scripts/environment.sh
encoder=models/small-encoder
[ -d "$encoder" ] || python -m clpl_moe.small_encoder --output "$encoder"
[ -d "$work/collection/$language" ] ||
    python -m clpl_moe.prepare --squad "$file" --language "$language" --output "$work/collection" --titles false
[ -f "$work/train.jsonl" ] ||
    python -m clpl_moe.mine --model "$encoder" --collection "$work/collection" --language "$language" --split train \
        --output "$work/train.jsonl" --query_max_len 64 --passage_max_len 256 \
        --rank_to 60 --max_positive_ratio 0 --max_overlap 1
python -m clpl_moe.train --config configs/squad.yaml --train_data "$work/train.jsonl" --output_dir "$work/model" \
    --resume_from_checkpoint true "$@"
python -m clpl_moe.evaluate --model "$encoder" "$work/model" --collection "$work/collection" --languages "$language" \
    --split dev --query_max_len 64 --passage_max_len 256 --output "$work/results" --overwrite true
python scripts/collect_results.py "$work/results" "$work/model" "${OUTPUT:-$work/results.json}"
