import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import quantize_embeddings

from clpl_moe.retrieval import store
from clpl_moe.retrieval.nearest import nearest
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.retrieval.quantize import QuantizedPassages
from clpl_moe.retrieval.search import search
from clpl_moe.retrieval.store import EmbeddingShards

KINDS = pytest.mark.parametrize("kind", ["int8", "binary"])


def embeddings(count, dimensions=64, seed=0):
    return F.normalize(torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """200 embeddings on disk, in shards of 30."""
    monkeypatch.setattr(store, "SHARD_TEXTS", 30)
    found = EmbeddingShards(tmp_path, 200, 64)
    for number in range(found.count):
        rows = found.rows(number)
        found.write(number, embeddings(200)[rows.start : rows.stop].half())
    return found


@KINDS
def test_codes_are_those_of_sentence_transformers(shards, kind):
    whole = shards[0:200].float().numpy()
    found = QuantizedPassages(shards, kind)
    if kind == "int8":
        expected = quantize_embeddings(whole, "int8")
        assert found.codes.nbytes * 4 == whole.nbytes
        np.testing.assert_array_equal(found[10:40].numpy(), expected[10:40])
    else:
        expected = quantize_embeddings(whole, "ubinary")
        assert found.codes.nbytes * 32 == whole.nbytes
        np.testing.assert_array_equal(found[10:40].numpy(), whole[10:40] > 0)
    np.testing.assert_array_equal(found.codes, expected)


@KINDS
@pytest.mark.parametrize("k", [1, 50, 300])
def test_equals_exact_search_where_all_is_scored_again(shards, kind, k):
    queries = embeddings(7, seed=1)
    found, expected = QuantizedPassages(shards, kind).search(queries, k, 300), search(queries, shards, k)
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@KINDS
def test_of_equal_scores_the_lower_index_goes_first(kind):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-2, 3, (9, 4), generator=generator).float()
    passages = torch.randint(-2, 3, (50, 4), generator=generator).float()
    found, expected = QuantizedPassages(passages, kind).search(queries, 20, 3), search(queries, passages, 20)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@KINDS
def test_finds_most_and_scores_it_exactly(kind):
    passages, queries = embeddings(2000), embeddings(20, seed=1)
    scores, exact = search(queries, passages, 10)
    shares = {}
    for oversampling in (1, 4):
        options = EncodingArguments(quantize=kind, oversampling=oversampling)
        found_scores, found = nearest(queries, passages, 10, options)
        torch.testing.assert_close(found_scores, (queries @ passages.T).gather(1, found))
        assert (found_scores.diff(dim=1) <= 0).all()
        shares[oversampling] = (found.unsqueeze(2) == exact.unsqueeze(1)).any(2).float().mean().item()
    # Of random vectors, whose neighbours are hardly nearer than others.
    assert shares[4] >= {"int8": 1, "binary": 0.5}[kind]
    assert shares[4] > shares[1] > {"int8": 0.95, "binary": 0.2}[kind]
    assert torch.equal(nearest(queries, passages, 10, EncodingArguments())[0], scores)


@KINDS
def test_a_constant_dimension_one_passage_and_none(kind):
    passages = torch.tensor([[0.5, 1.0], [0.5, -1.0]])
    found = QuantizedPassages(passages, kind).search(torch.tensor([[1.0, -1.0]]), 1, 1)
    assert found[1].tolist() == [[1]]
    assert QuantizedPassages(passages[:1], kind).search(torch.ones(1, 2), 5, 4)[1].tolist() == [[0]]
    for shape in ((0, 2), (3, 2)):
        scores, indices = QuantizedPassages(torch.empty(3 - shape[0], 2).fill_(1), kind).search(torch.ones(shape), 5, 4)
        assert scores.shape == indices.shape == (shape[0], 3 - shape[0])
