import os
import subprocess
import sys
import time

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.encode import encode
from clpl_moe.encode.__main__ import main
from clpl_moe.mine import mine
from clpl_moe.retrieval import store
from helpers.evaluating import run
from helpers.mining import PASSAGES, make_collection

SHORT = {"query_max_len": 60, "passage_max_len": 100, "dtype": "float32"}
MINING = {"language": "ko", "rank_to": 8, "negatives": 4, "max_positive_ratio": 0}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD_TEXTS", 4)


@pytest.fixture
def collection(tmp_path):
    """With passages that mining leaves out."""
    passages = {"empty": "", **PASSAGES, "again": PASSAGES["p3"], "dev": "of another split"}
    return make_collection(tmp_path / "data", passages, splits={"dev": "dev"})


def shards(cache):
    return {path.name: path.read_bytes() for path in cache.glob("*/*")}


def test_mine_and_evaluate_read_what_encode_writes(tiny_encoder, collection, tmp_path, capsys):
    cache = tmp_path / "cache"
    argv = ["--model", tiny_encoder, "--collection", collection, "--languages", "ko", "--cache_dir", cache]
    main([*map(str, argv), *(f"--{name}={value}" for name, value in SHORT.items())])
    assert capsys.readouterr().out.endswith(", 19 encoded here\n")
    written = shards(cache)
    assert len(written) == 6  # five shards and the manifest; no claims
    run(tiny_encoder, collection, tmp_path / "results", cache_dir=cache, split="train", **SHORT)
    assert "5 of 5 shards found" in capsys.readouterr().out
    options = {"model": tiny_encoder, "collection": collection, **MINING, **SHORT}
    mine(**options, output=tmp_path / "cached.jsonl", cache_dir=cache)
    assert "5 of 5 shards found" in capsys.readouterr().out
    assert shards(cache) == written
    mine(**options, output=tmp_path / "train.jsonl")
    assert (tmp_path / "cached.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()


def test_a_second_call_finds_all(tiny_encoder, collection, tmp_path):
    options = {"model": tiny_encoder, "collection": collection, "languages": ["ko"], "cache_dir": tmp_path / "cache"}
    first, second = encode(**options, **SHORT)["ko"], encode(**options, **SHORT)["ko"]
    assert (first.passages, first.encoded, second.passages, second.encoded) == (19, 19, 19, 0)
    assert first.folder == second.folder


def test_what_can_be_refused(tiny_encoder, collection, tmp_path):
    options = {"model": tiny_encoder, "collection": collection, "languages": ["ko"], **SHORT}
    with pytest.raises(UserError, match="cache_dir: found nothing, expected the folder of the embeddings"):
        encode(**options)
    with pytest.raises(UserError, match="cache_dir: found nothing, expected the name of an output"):
        encode(**options, cache_dir="")
    with pytest.raises(UserError, match="no such folder"):
        encode(**options | {"languages": ["ko", "xx"]}, cache_dir=tmp_path / "cache")
    for given in ({"quantize": "int8"}, {"index": "approximate"}):
        with pytest.raises(UserError, match=f"^{next(iter(given))}: goes with a search, and here is none"):
            encode(**options | given, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# A process whose second shard is never written, and one that is like any other.
STUCK = """
import sys, time
from clpl_moe.retrieval.store import EmbeddingShards
write = EmbeddingShards.write
def stuck(shards, number, embeddings):
    if shards.encoded:
        print("stuck", flush=True)
        time.sleep(600)
    write(shards, number, embeddings)
EmbeddingShards.write = stuck
"""
USUAL = "import sys; from clpl_moe.retrieval import store; store.SHARD_TEXTS = 4; from clpl_moe.encode.__main__ import main; main(sys.argv[1:])"


@pytest.mark.slow
def test_others_finish_what_a_killed_process_had_begun(tiny_encoder, collection, tmp_path):
    options = {"model": tiny_encoder, "collection": collection, "languages": "ko", **SHORT}

    def start(script, cache):
        argv = [f"--{name}={value}" for name, value in (options | {"cache_dir": cache}).items()]
        command = [sys.executable, "-c", script, *argv]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    cache = tmp_path / "cache"
    killed = start(f"{STUCK}\n{USUAL}", cache)
    assert any(line == "stuck\n" for line in killed.stdout)
    others = [start(USUAL, cache) for _ in range(2)]
    deadline = time.monotonic() + 600
    # All but what the first process claims: a shard and the next.
    while [len(list(cache.glob(f"*/*.{kind}"))) for kind in ("npy", "claim")] != [3, 2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [process.poll() for process in others] == [None, None]  # they wait for it
    killed.kill()
    killed.wait()
    encoded = []
    for process in others:
        printed = process.communicate(timeout=600)[0]
        assert process.returncode == 0
        encoded.append(int(printed.split()[-3]))
    assert sum(encoded) == 15  # nothing twice
    encode(**options | {"languages": ["ko"]}, cache_dir=tmp_path / "alone")
    assert shards(cache) == shards(tmp_path / "alone")
