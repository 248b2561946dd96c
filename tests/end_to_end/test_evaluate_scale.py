"""Evaluation through the real command: killed on the way, and in several processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clpl_moe.common.files import write_jsonl
from clpl_moe.retrieval.store import SHARD_TEXTS

SHARDS = 8
# Runs a module that is killed when it has written so many shards, or else in the search.
KILLED = """
import os, runpy, signal, sys
from clpl_moe.retrieval.store import EmbeddingShards

left, written = int(sys.argv.pop(1)), EmbeddingShards.write

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def write(*args):
    global left
    written(*args)
    left -= 1
    if left == 0:
        kill()

EmbeddingShards.write, EmbeddingShards.__getitem__ = write, kill
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Eight shards of short texts, all different, and some queries."""
    folder = tmp_path_factory.mktemp("data") / "ko"
    letters = "abcdefghijklmnop"
    texts = ["".join(letters[n >> shift & 15] for shift in (12, 8, 4, 0)) for n in range(SHARDS * SHARD_TEXTS - 5)]
    write_jsonl(folder / "corpus.jsonl", ({"id": f"p{n}", "text": text} for n, text in enumerate(texts)))
    asked = range(0, len(texts), 4000)
    write_jsonl(folder / "dev_queries.jsonl", ({"id": f"q{n}", "text": texts[n] + "q"} for n in asked))
    write_jsonl(folder / "dev_qrels.jsonl", ({"qid": f"q{n}", "docid": f"p{n}", "relevance": 1} for n in asked))
    return folder.parent


@pytest.fixture(scope="module")
def start(tiny_encoder, collection):
    """Function that starts the command with an output folder, through a launcher or not."""

    def start(output: Path, launcher=("-m",)) -> subprocess.Popen:
        command = [sys.executable, *launcher, "clpl_moe.evaluate", "--model", tiny_encoder, "--collection", collection]
        command += ["--languages", "ko", "--output", output, "--passage_max_len", "16", "--top_k", "50"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*map(str, command), "--dtype", "float32"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    printed, errors = (process := start(output)).communicate()
    assert process.returncode == 0, errors
    assert f"0 of {SHARDS} shards found" in printed
    assert sorted(path.name for path in (output / "ko").iterdir()) == ["metrics.json", "qrels.trec", "run.trec"]
    return result(output)


def result(output: Path) -> tuple[bytes, dict]:
    content = json.loads((output / "ko" / "metrics.json").read_text())
    del content["seconds"], content["passages_per_second"]
    return (output / "ko" / "run.trec").read_bytes(), content


@pytest.mark.slow
def test_killed_three_times_it_gives_the_same_and_encodes_nothing_twice(start, undisturbed, tmp_path):
    made: dict[Path, int] = {}
    for more in (1, 2, SHARDS):  # the last time in the search
        printed, errors = (process := start(tmp_path, ("-c", KILLED, more))).communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert f" {len(made)} of {SHARDS} shards found" in printed
        now = {path: path.stat().st_mtime_ns for path in tmp_path.glob("_clpl_moe/embeddings/*/*.npy")}
        assert len(now) == min(SHARDS, len(made) + more)
        assert made.items() <= now.items()
        made = now
    assert not (tmp_path / "ko" / "metrics.json").exists()
    assert len(made) == SHARDS
    printed, errors = (process := start(tmp_path)).communicate()
    assert process.returncode == 0, errors
    assert f"{SHARDS} of {SHARDS} shards found" in printed
    assert result(tmp_path) == undisturbed
    assert not (tmp_path / "_clpl_moe").exists()


@pytest.mark.slow
def test_two_processes_give_the_same(start, undisturbed, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    printed, errors = (process := start(tmp_path, launcher)).communicate()
    assert process.returncode == 0, errors
    assert printed.count("shards found") == 1
    assert printed.count("nDCG@10") == 1
    assert result(tmp_path) == undisturbed
    assert json.loads((tmp_path / "ko" / "metrics.json").read_text())["passages_per_second"] > 0
    assert not (tmp_path / "_clpl_moe").exists()
