import numpy as np
import pytest
import torch

from clpl_moe.retrieval import search as search_module
from clpl_moe.retrieval.search import search


def reference(queries, passages, k):
    """Sort everything: by descending score, then by index."""
    scores = (queries @ passages.T).numpy()
    order = np.stack([np.lexsort((np.arange(len(row)), -row)) for row in scores])[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 50, 1000])
@pytest.mark.parametrize("k", [1, 5, 49, 50, 80])
def test_equals_a_full_sort(chunk_size, k):
    generator = torch.Generator().manual_seed(0)
    # Small integers: exact in float32, and full of ties.
    queries = torch.randint(-2, 3, (9, 4), generator=generator).float()
    passages = torch.randint(-2, 3, (50, 4), generator=generator).float()
    scores, indices = search(queries, passages, k, chunk_size=chunk_size)
    expected_scores, expected_indices = reference(queries, passages, k)
    assert scores.dtype == torch.float32
    assert indices.dtype == torch.int64
    np.testing.assert_array_equal(scores.numpy(), expected_scores)
    np.testing.assert_array_equal(indices.numpy(), expected_indices)


def test_all_equal_scores_come_in_index_order():
    _, indices = search(torch.ones(2, 3), torch.ones(40, 3), 10, chunk_size=16)
    assert indices.tolist() == [list(range(10))] * 2


def test_queries_in_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    queries, passages = torch.randn(11, 8, generator=generator), torch.randn(30, 8, generator=generator)
    monkeypatch.setattr(search_module, "_QUERY_BLOCK", 4)
    scores, indices = search(queries, passages, 6, chunk_size=8)
    expected_scores, expected_indices = reference(queries, passages, 6)
    np.testing.assert_allclose(scores.numpy(), expected_scores, rtol=1e-5)
    np.testing.assert_array_equal(indices.numpy(), expected_indices)


def test_half_precision_passages_are_searched_in_float32():
    generator = torch.Generator().manual_seed(2)
    queries, passages = torch.randn(3, 8, generator=generator), torch.randn(30, 8, generator=generator).half()
    scores, _ = search(queries, passages, 4)
    np.testing.assert_allclose(scores.numpy(), reference(queries, passages.float(), 4)[0], rtol=1e-6)


def test_no_passages_and_no_queries():
    scores, indices = search(torch.ones(2, 3), torch.empty(0, 3), 5)
    assert scores.shape == indices.shape == (2, 0)
    scores, indices = search(torch.empty(0, 3), torch.ones(4, 3), 5)
    assert scores.shape == indices.shape == (0, 4)


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="k and chunk_size"):
        search(torch.ones(1, 2), torch.ones(1, 2), 0)
    with pytest.raises(ValueError, match="2 dimensions, passages 3"):
        search(torch.ones(1, 2), torch.ones(1, 3), 1)
