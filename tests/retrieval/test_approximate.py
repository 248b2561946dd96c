import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clpl_moe.common.errors import OptionError
from clpl_moe.retrieval import approximate as module
from clpl_moe.retrieval import store
from clpl_moe.retrieval.approximate import ApproximateIndex
from clpl_moe.retrieval.nearest import nearest
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.retrieval.search import search
from clpl_moe.retrieval.store import EmbeddingRows, EmbeddingShards
from helpers.evaluating import make_collection, run

faiss = pytest.importorskip("faiss")
NUMBER = 3000


def clustered(count, seed=0, dimensions=32):
    """Embeddings around 50 centres."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(50, dimensions, generator=torch.Generator().manual_seed(9))
    near = centres[torch.randint(50, (count,), generator=draw)]
    return F.normalize(near + 0.5 * torch.randn(count, dimensions, generator=draw), dim=-1)


def options(**more):
    return EncodingArguments(index="approximate", **more)


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_TEXTS", 700)
    found = EmbeddingShards(tmp_path, NUMBER, 32)
    for number in range(found.count):
        rows = found.rows(number)
        found.write(number, clustered(NUMBER)[rows.start : rows.stop].half())
    return found


def test_finds_most_and_scores_it_exactly(shards, capsys):
    queries = clustered(300, 1)
    scores, places = nearest(queries, shards, 10, options(index_recall=0.9))
    _expected_scores, expected = search(queries, shards, 10)
    recall = (places.unsqueeze(2) == expected.unsqueeze(1)).any(2).float().mean().item()
    printed = capsys.readouterr().out
    assert recall > 0.85
    assert f"recall@10 {recall:.2f}"[:-1] in printed  # of 200 queries, of 300 here
    assert "on 200 of 300 queries" in printed
    torch.testing.assert_close(scores, (queries @ shards[:].float().T).gather(1, places))
    assert (scores.diff(dim=1) <= 0).all()
    assert (places >= 0).all()


def test_a_higher_recall_looks_at_more_lists(shards):
    queries, searched = clustered(50, 1), []
    for wanted in (0.3, 0.99):
        index = ApproximateIndex(shards, options(index_recall=wanted))
        index.search(queries, 20)
        assert index.about["recall"] >= wanted
        searched.append(index.about["lists_searched"])
    assert searched[0] < searched[1] <= index.about["lists"] == 54


def test_the_recall_is_reached_where_codes_say_little():
    draw = torch.Generator().manual_seed(0)
    passages, queries = (F.normalize(torch.randn(n, 64, generator=draw), dim=1) for n in (8000, 40))
    index = ApproximateIndex(passages, options())
    found = index.search(queries, 50)[1]
    assert index.about["recall"] >= 0.95
    assert 4 * 50 < index.about["candidates"] < 8000
    assert f"{index.about['candidates']:,} candidates" in str(index)
    exact = search(queries, passages, 50)[1]
    assert (found.unsqueeze(2) == exact.unsqueeze(1)).any(2).float().mean() >= 0.95


def test_blocks_of_queries_find_what_all_find_together(shards, monkeypatch):
    queries = clustered(30, 1)
    expected = nearest(queries, shards, 10, options())
    monkeypatch.setattr(module, "_CANDIDATES_AT_ONCE", 100)
    found = nearest(queries, shards, 10, options())
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


def test_no_queries(shards):
    assert nearest(torch.empty(0, 32), shards, 10, options())[1].shape == (0, 10)


def test_equals_exact_search_where_all_is_scored_again(shards):
    queries = clustered(7, 1)
    for k in (NUMBER, NUMBER + 5):  # more than any few lists hold
        found, expected = nearest(queries, shards, k, options(index_recall=1.0)), search(queries, shards, k)
        torch.testing.assert_close(found[0], expected[0])
        assert torch.equal(found[1].sort().values, expected[1].sort().values)


def test_an_index_is_kept_beside_the_embeddings(shards, monkeypatch):
    queries = clustered(20, 1)
    rows = EmbeddingRows(shards, np.arange(0, NUMBER, 2))
    found = [nearest(queries, passages, 5, options()) for passages in (shards, rows)]
    files = sorted(shards.folder.glob("*.faiss"))
    assert len(files) == 2
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr(faiss, "index_factory", None)  # nothing is built
    for passages, expected in zip((shards, rows), found):
        assert torch.equal(nearest(queries, passages, 5, options())[1], expected[1])
    monkeypatch.undo()
    files[0].write_bytes(before[0][:1000])
    monkeypatch.setattr(store, "SHARD_TEXTS", 700)
    for passages, expected in zip((shards, rows), found):
        assert torch.equal(nearest(queries, passages, 5, options())[1], expected[1])
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("dimensions", [30, 31])
def test_any_number_of_dimensions_and_no_files(dimensions):
    passages, queries = clustered(1500, 0, dimensions), clustered(10, 1, dimensions)
    index = ApproximateIndex(passages, options())
    index.search(queries, 5)
    assert index.about["recall"] >= 0.9


def test_few_passages_are_searched_exactly(shards, capsys):
    few, queries = EmbeddingRows(shards, np.arange(5, 50)), clustered(3, 1)
    assert torch.equal(nearest(queries, few, 5, options())[1], search(queries, few, 5)[1])
    assert "fewer than 1,000 passages need no index" in capsys.readouterr().out


def test_evaluation_shows_recall(tiny_encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_LEAST", 16)
    monkeypatch.setattr(module, "_TRAINED_ON", 5)
    collection = make_collection(tmp_path / "data", "ko")
    run(tiny_encoder, collection, tmp_path / "out", index="approximate", top_k=5, query_max_len=60)
    assert "8 queries" in next(line for line in capsys.readouterr().out.splitlines() if " of 4 " in line)


def test_what_can_be_refused(monkeypatch):
    with pytest.raises(OptionError, match="leave out quantize"):
        options(quantize="int8")
    with pytest.raises(OptionError, match="goes with index approximate, not with exact"):
        EncodingArguments(index_recall=0.5)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r'pip install "clpl-moe\[ann\]"'):
        options()
