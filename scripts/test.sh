#!/usr/bin/env bash
# Set up a virtual environment; run the linters, the type checker and the tests: scripts/test.sh [all | pytest arguments]
# "all" also runs the slow tests (training in several processes), as CI does.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

ruff check .
ruff format --check .
lint-imports
mypy
# A worker a core; a file's tests stay together, since they share what their fixtures make.
pytest="python -m pytest -n auto --maxprocesses 4 --dist loadfile"
if [ "${1:-}" = "all" ]; then
    shift
    $pytest -m "not gpu" "$@"
else
    $pytest "$@"
fi
