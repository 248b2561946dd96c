# Sourced by the other scripts: a virtual environment in .venv with this package in it.
# PYTHON chooses the interpreter; VENV another folder.
VENV="${VENV:-.venv}"
if [ ! -x "$VENV/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
fi
. "$VENV/bin/activate"
stamp="$VENV/.installed"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    python -m pip install --quiet --disable-pip-version-check --upgrade pip
    # On a machine without an NVIDIA GPU, the CPU build of torch where pip's index has one: the default build on Linux
    # brings gigabytes of CUDA libraries. TORCH names another version or build.
    if ! python -c "import torch" 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
        python -m pip install --quiet --disable-pip-version-check "${TORCH:-torch==2.13.0}"
    fi
    python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
    touch "$stamp"
fi
