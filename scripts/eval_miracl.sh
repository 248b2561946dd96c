#!/usr/bin/env bash
# MIRACL's dev queries, or those of another collection, with one model or several:
#
#   scripts/eval_miracl.sh MODEL [LANGUAGE ...] [--option value ...]
#   scripts/eval_miracl.sh MODEL MODEL ... -- [LANGUAGE ...] [--option value ...]
#
# A model is a folder or a hub name; the languages are ko fa hi unless named; options go to `python -m clpl_moe.evaluate`.
# Paths, also in options, are seen from where the caller is.
# The environment can name: COLLECTION, a folder with a collection per language, used as it is (no network); without it MIRACL
# is fetched into the repository's data/miracl (MIRACL_SOURCE: a folder with MIRACL's own files, instead of the hub). OUTPUT, where
# the results go; without it the repository's results/miracl (or results/ and the collection's name), in a folder per model: a model
# that was evaluated alone is not computed again when it is compared. GPUS, how many of them encode.
set -euo pipefail

# A folder goes by its own name, also as `.` or `x/`.
absolute() {
    if [ -d "$1" ]; then
        (CDPATH='' cd -- "$1" && pwd)
    else
        case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
    fi
}
models=() languages=() options=()
several=false
for argument in "$@"; do [ "$argument" = "--" ] && several=true; done
while [ $# -gt 0 ] && [ "$1" != "--" ] && { $several || [ ${#models[@]} -eq 0 ]; }; do
    [ -d "$1" ] && models+=("$(absolute "$1")") || models+=("$1") # what is not there is a hub name
    shift
done
[ "${1:-}" = "--" ] && shift
while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do
    languages+=("$1")
    shift
done
options=("$@")
if [ ${#models[@]} -eq 0 ] || [ "${models[0]#-}" != "${models[0]}" ]; then
    echo "usage: scripts/eval_miracl.sh MODEL [LANGUAGE ...] [--option value ...] (several models: MODEL ... -- LANGUAGE ...)" >&2
    exit 2
fi
[ ${#languages[@]} -gt 0 ] || languages=(ko fa hi)

output=${OUTPUT:+$(absolute "$OUTPUT")}
source=${MIRACL_SOURCE:+$(absolute "$MIRACL_SOURCE")}
collection=${COLLECTION:+$(absolute "$COLLECTION")}

caller=$PWD
cd "$(dirname "$0")/.."
root=$PWD
VENV=$(absolute "${VENV:-.venv}") # of the repository, as in the other scripts
. scripts/environment.sh
cd "$caller"
if [ -n "$collection" ]; then
    default=$root/results/$(basename "$collection")
else
    collection=$root/data/miracl
    default=$root/results/miracl
    for language in "${languages[@]}"; do
        [ -d "$collection/$language" ] ||
            python -m clpl_moe.prepare --miracl "$language" --output "$collection" ${source:+--source "$source"}
    done
fi
[ ${#models[@]} -gt 1 ] || default+=/$(basename "${models[0]}")
launch=(python)
[ "${GPUS:-1}" -le 1 ] || launch=(torchrun --standalone --nproc_per_node "$GPUS")
exec "${launch[@]}" -m clpl_moe.evaluate --model "${models[@]}" --collection "$collection" --languages "${languages[@]}" \
    --output "${output:-$default}" ${options[@]+"${options[@]}"}
