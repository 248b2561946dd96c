#!/usr/bin/env bash
# The fast tests with the lowest versions that pyproject.toml allows: scripts/test_lowest.sh [pytest arguments]
# TORCH names another torch than the lowest, whose build on Linux brings 7 GB of CUDA libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV="${VENV:-.venv-lowest}"
if [ ! -x "$VENV/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
fi
. "$VENV/bin/activate"
stamp="$VENV/.installed"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    python -m pip install --quiet --disable-pip-version-check --upgrade pip uv
    lowest="$VENV/lowest.txt"
    uv pip compile --quiet --no-header --no-annotate --resolution lowest-direct --extra dev \
        --python "$VENV/bin/python" --output-file "$lowest" pyproject.toml
    if [ -n "${TORCH:-}" ]; then
        # What belongs to the lowest torch does not fit another one.
        sed -i -E '/^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==/d' "$lowest"
        printf '%s\n' "$TORCH" triton >> "$lowest"
    fi
    python -m pip install --quiet --disable-pip-version-check --requirement "$lowest" hatchling editables
    python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    touch "$stamp"
fi
python -c "
import importlib.metadata as m
print('lowest versions:', ', '.join(f'{p} {m.version(p)}' for p in ('torch', 'transformers', 'datasets', 'sentence-transformers', 'numpy')))"
python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
