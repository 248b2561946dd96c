import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist

from clpl_moe.common.errors import UserError
from clpl_moe.encoder import encode as encode_module
from clpl_moe.retrieval import store
from clpl_moe.retrieval.options import EncodingArguments, open_encoder
from clpl_moe.retrieval.search import search
from clpl_moe.retrieval.store import EmbeddingShards, cache_folder, encode_passages
from helpers.processes import run_in_processes

TEXTS = [f"{a}{b} {'x' * (a * 7 % 11)}" for a in range(5) for b in range(5)] + ["", "한국어", "", "متن"]
ENCODING = EncodingArguments(passage_max_len=20, dtype="float32")


class Texts(list):
    """A corpus that notes how far it has been read."""

    reached = 0

    def __getitem__(self, index):
        self.reached = max(self.reached, index.stop)
        return super().__getitem__(index)


@pytest.fixture
def encoder(tiny_encoder):
    return open_encoder(str(tiny_encoder), ENCODING)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD_TEXTS", 8)


def encoded_texts(encoder, monkeypatch):
    """How many sequences go through the encoder from now on, as a list that grows."""
    counts = []
    original = encode_module._embed
    monkeypatch.setattr(encode_module, "_embed", lambda encoder, s: counts.append(len(s)) or original(encoder, s))
    return counts


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*/*")}


def test_shards_are_the_embeddings_in_half_precision(encoder, tmp_path):
    expected = encode_passages(encoder, TEXTS, ENCODING, progress=False)
    assert expected.dtype == torch.float32
    shards = encode_passages(encoder, TEXTS, ENCODING, cache=tmp_path, progress=False)
    assert len(shards) == len(TEXTS) == shards.encoded
    assert shards.shape == expected.shape
    assert [path.name for path in sorted(tmp_path.glob("*/*.npy"))] == [f"00000{i}.npy" for i in range(4)]
    for start, stop in ((0, 29), (0, 8), (5, 20), (8, 16), (28, 40), (3, 3)):
        part = shards[start:stop]
        assert part.dtype == torch.float16
        torch.testing.assert_close(part.float(), expected[start:stop], atol=1e-3, rtol=0)
    rows = [28, 0, 8, 7, 0, 26]
    assert shards[rows].dtype == torch.float32
    assert torch.equal(shards[rows], shards[:][rows].float())
    assert shards[[]].shape == (0, 32)
    assert torch.equal(shards[-3:], shards[26:29])
    with pytest.raises(ValueError, match="a step of 2"):
        shards[::2]
    assert (expected[0] - expected[1]).abs().max() > 1e-2


def test_search_reads_shards_as_it_reads_a_tensor(encoder, tmp_path):
    shards = encode_passages(encoder, TEXTS, ENCODING, cache=tmp_path, progress=False)
    queries = shards[[3, 27, 26]]
    for chunk_size in (5, 8, 100):
        found = search(queries, shards, 10, chunk_size=chunk_size)
        expected = search(queries, shards[:], 10, chunk_size=chunk_size)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert found[1][1].tolist()[:2] == [25, 27]  # equal texts, by index


def test_equal_texts_of_a_shard_are_encoded_once_and_batches_are_of_equal_length(encoder, tmp_path, monkeypatch):
    counts = encoded_texts(encoder, monkeypatch)
    encode_passages(encoder, ["a", "b", "a", "a", "b"], ENCODING, cache=tmp_path, progress=False)
    assert counts == [2]


def test_an_interrupted_encoding_goes_on_where_it_stopped(encoder, tmp_path, monkeypatch, capsys):
    undisturbed = encode_passages(encoder, TEXTS, ENCODING, cache=tmp_path / "whole", progress=False)
    counts = encoded_texts(encoder, monkeypatch)
    original = EmbeddingShards.write
    for stop in (0, 2):

        def write(shards, number, embeddings, stop=stop):
            original(shards, number, embeddings)
            if number == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(EmbeddingShards, "write", write)
        with pytest.raises(KeyboardInterrupt):
            encode_passages(encoder, TEXTS, ENCODING, cache=tmp_path / "cut", progress=False)
    monkeypatch.setattr(EmbeddingShards, "write", original)
    shards = encode_passages(encoder, TEXTS, ENCODING, cache=tmp_path / "cut")
    assert "3 of 4 shards found" in capsys.readouterr().out
    assert shards.encoded == 5
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    distinct = [len(set(TEXTS[i : i + 8])) for i in range(0, len(TEXTS), 8)]
    assert sum(counts) == sum(distinct)  # nothing twice
    counts.clear()
    again = encode_passages(encoder, TEXTS, ENCODING, cache=tmp_path / "cut", progress=False)
    assert not counts
    assert again.encoded == 0
    assert torch.equal(again[:], undisturbed[:])


@pytest.mark.parametrize("damage", ["cut off", "of another shape", "no array"])
def test_a_damaged_shard_is_made_again(encoder, tmp_path, damage):
    shards = encode_passages(encoder, TEXTS, ENCODING, cache=tmp_path, progress=False)
    before = files(tmp_path)
    if damage == "cut off":
        shards.file(1).write_bytes(shards.file(1).read_bytes()[:-10])
    elif damage == "no array":
        shards.file(1).write_bytes(b"")
    else:
        np.save(shards.file(1), np.zeros((7, 32), np.float16))
    assert encode_passages(encoder, TEXTS, ENCODING, cache=tmp_path, progress=False).encoded == 8
    assert files(tmp_path) == before


def test_other_content_never_meets_these_shards(encoder, tmp_path):
    def folders(encoder=encoder, texts=TEXTS, encoding=ENCODING):
        encode_passages(encoder, texts, encoding, cache=tmp_path, progress=False)
        return {path.name for path in tmp_path.iterdir()}

    changed = dataclasses.replace
    known = folders()
    same = [
        {"texts": tuple(TEXTS)},
        {"encoding": changed(ENCODING, batch_tokens=30, query_max_len=9)},
        {"encoder": changed(encoder, settings=changed(encoder.settings, query_prompt="q: "))},
    ]
    for change in same:
        assert folders(**change) == known
    others = [
        {"texts": [*TEXTS[:-1], "متنx"]},
        {"texts": [TEXTS[0] + TEXTS[1], "", *TEXTS[2:]]},
        {"texts": TEXTS[::-1]},
        {"encoding": changed(ENCODING, passage_max_len=19)},
        {"encoder": changed(encoder, settings=changed(encoder.settings, passage_prompt="p: "))},
        {"encoder": changed(encoder, settings=changed(encoder.settings, pooling="mean"))},
        {"encoder": changed(encoder, compute_dtype=torch.bfloat16)},
    ]
    for change in others:
        now = folders(**change)
        assert len(now) == len(known) + 1
        known = now
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[5] += 1
    assert len(folders()) == len(known) + 1


def test_a_manifest_says_what_the_shards_are(encoder, tmp_path):
    encode_passages(encoder, TEXTS, ENCODING, cache=tmp_path, progress=False)
    (path,) = tmp_path.glob("*/manifest.json")
    content = json.loads(path.read_text())
    assert content["texts"] == len(TEXTS)
    assert content["max_length"] == 20
    assert "deleted" in content["what"]


def test_texts_are_read_as_they_are_needed(encoder, tmp_path, monkeypatch):
    texts, reached = Texts(TEXTS), []
    original = EmbeddingShards.write
    monkeypatch.setattr(EmbeddingShards, "write", lambda *a: reached.append((a[1], texts.reached)) or original(*a))
    encode_passages(encoder, texts, ENCODING, cache=tmp_path, progress=False)
    # At most one shard ahead of the one that is written.
    assert len(reached) == 4
    assert all(read <= 8 * (number + 2) for number, read in reached)


def test_what_can_be_refused(encoder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="passage_max_len: found 500 tokens, the encoder takes 128 at most"):
        encode_passages(encoder, TEXTS, dataclasses.replace(ENCODING, passage_max_len=500), cache=tmp_path)
    usage = type(shutil.disk_usage("."))(10**12, 10**12, 100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(UserError, match="on another one by cache_dir"):
            encode_passages(encoder, TEXTS, ENCODING, cache=tmp_path / "full", progress=False)
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[:] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite embeddings"):
        encode_passages(encoder, TEXTS, ENCODING, cache=tmp_path, progress=False)
    assert not list(tmp_path.glob("*/*.npy"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        EncodingArguments(cache_dir=str(tmp_path / "file" / "cache"))


def test_no_passages(encoder, tmp_path):
    shards = encode_passages(encoder, [], ENCODING, cache=tmp_path, progress=False)
    assert shards.shape == (0, 32)
    assert search(torch.ones(2, 32), shards, 5)[0].shape == (2, 0)


def test_a_folder_that_the_user_did_not_name_goes_away_when_all_went_well(tmp_path):
    beside, named = tmp_path / "beside", tmp_path / "named"
    for interrupted in (True, False):
        for encoding in (ENCODING, dataclasses.replace(ENCODING, cache_dir=str(named))):
            try:
                with cache_folder(encoding, beside=beside) as folder:
                    folder.mkdir(exist_ok=True)
                    if interrupted:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                assert folder.is_dir()
        assert beside.exists() == interrupted
        assert named.exists()


class Work:
    """Of two processes: encode, and tell what this one did and what it reads."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder

    def __call__(self, rank):
        store.SHARD_TEXTS, write, waited = 8, EmbeddingShards.write, []

        def write_together(*args):
            if not waited:  # until the other one has begun, too: it may be slow to
                dist.barrier()
            waited.append(True)
            write(*args)

        EmbeddingShards.write = write_together
        encoder = open_encoder(str(self.model), ENCODING)
        shards = encode_passages(encoder, TEXTS, ENCODING, cache=self.folder, progress=False)
        return shards.encoded, shards[:]


@pytest.mark.slow
def test_processes_share_the_shards_and_read_all(encoder, tiny_encoder, tmp_path):
    whole = encode_passages(encoder, TEXTS, ENCODING, cache=tmp_path / "whole", progress=False)
    (tmp_path / "meeting").mkdir()
    found = run_in_processes(Work(tiny_encoder, tmp_path / "cache"), tmp_path / "meeting")
    assert [encoded for encoded, _ in found] == [16, 13]
    assert all(torch.equal(read, whole[:]) for _, read in found)
    assert files(tmp_path / "cache") == files(tmp_path / "whole")
