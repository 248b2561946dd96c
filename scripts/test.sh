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
if [ "${1:-}" = "all" ]; then
    shift
    python -m pytest -m "not gpu" "$@"
else
    python -m pytest "$@"
fi
