#!/usr/bin/env bash
# The training files published in 2024 into data/published, and what `validate` says of them: scripts/download_data.sh [ko] [fa] [hi]
# An interrupted download goes on when run again. DATA_URL names another place that has the files, OUTPUT another folder.
set -euo pipefail
case "${OUTPUT:-}" in
    '' | /*) ;;
    *) OUTPUT="$PWD/$OUTPUT" ;; # seen from where the caller is
esac
cd "$(dirname "$0")/.."
. scripts/environment.sh
url="${DATA_URL:-https://github.com/CreaLabs/Enhanced-BGE-M3-with-CLP-and-MoE/raw/main/data}"
output="${OUTPUT:-data/published}"
[ $# -gt 0 ] || set -- ko fa hi

fail() {
    echo "error: $1" >&2
    exit 2
}

fetch() {
    code=$(curl --fail --location --retry 5 --retry-connrefused --connect-timeout 20 --continue-at - --write-out '%{http_code}' \
        --output "$1" "$2")
}

for language in "$@"; do
    case "$language" in
        ko | fa | hi) ;;
        *) fail "found '$language', expected ko, fa or hi" ;;
    esac
done
mkdir -p "$output"
files=()
for language in "$@"; do
    name="${language}_CLPL_train_data.jsonl"
    file="$output/$name"
    files+=("$file")
    if [ -f "$file" ]; then
        echo "$file is there already"
        continue
    fi
    echo "$url/$name"
    status=0
    fetch "$file.part" "$url/$name" || status=$?
    # 416: nothing comes after what is there; 33: the server cannot start in the middle.
    if [ -s "$file.part" ] && { [ "$code" = 416 ] || [ "$status" = 33 ]; }; then
        rm "$file.part"
        status=0
        fetch "$file.part" "$url/$name" || status=$?
    fi
    if [ "$status" != 0 ]; then
        fail "$url/$name could not be fetched (curl's code $status). Run this again to go on; without a network, place the file at $file yourself"
    fi
    if [ "$(head -c 1 "$file.part")" != "{" ]; then
        mv "$file.part" "$file.refused"
        fail "$url/$name: found something else than JSON lines, kept as $file.refused"
    fi
    mv "$file.part" "$file"
done
for file in "${files[@]}"; do
    echo "$(wc -l <"$file") lines, SHA-256 $(sha256sum "$file" | cut -d ' ' -f 1)  $file"
done
python -m clpl_moe.validate "${files[@]}"
