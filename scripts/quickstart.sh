#!/usr/bin/env bash
# From a fresh clone to a model that retrieves better, on a CPU: environment, then `clpl-moe quickstart`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

python -m clpl_moe.quickstart "$@"
