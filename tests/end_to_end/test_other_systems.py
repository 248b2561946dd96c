"""What Windows lacks is taken away from Python, and collections are read and mined all the same."""

import subprocess
import sys

import pytest

from clpl_moe.common.files import read_jsonl
from helpers.mining import make_collection, mine_by_command

# Names of os, and modules, that Python has on Linux and macOS only; without others, packages that we need do not load here.
WITHOUT = """
import os, sys

for name in ("pread", "pwrite", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
sys.modules["fcntl"] = None
"""
MINE = """
from clpl_moe.mine.__main__ import main
import clpl_moe.ablate.work, clpl_moe.llm.journal, clpl_moe.evaluate.evaluation, clpl_moe.prepare.sources
main(sys.argv[1:])
"""
TESTS = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"


def run(code, *argv):
    command = [sys.executable, "-c", WITHOUT + code, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_mining_needs_nothing_of_linux(tiny_encoder, tmp_path):
    here, there = (make_collection(tmp_path / name) for name in ("here", "there"))
    expected = mine_by_command(tiny_encoder, here)
    options = {"rank_from": 1, "rank_to": 8, "negatives": 4, "max_positive_ratio": 0, "max_overlap": 1}
    options |= {"passage_max_len": 100, "dtype": "float32", "language": "ko", "output": there / "train.jsonl"}
    run(MINE, f"--model={tiny_encoder}", f"--collection={there}", *(f"--{k}={v}" for k, v in options.items()))
    found = {record["query_id"]: record for _, record in read_jsonl(there / "train.jsonl")}
    assert found == expected
    assert sorted(path.name for path in there.iterdir()) == ["ko", "train.jsonl"]


@pytest.mark.slow
def test_the_tests_of_collections_pass_without_it(request):
    folder = request.path.parents[1]
    names = ("retrieval/test_collection.py", "mine/test_index.py", "common/test_output.py", "prepare/test_prepare.py")
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow")
    run(TESTS, *options, *(folder / name for name in names))
