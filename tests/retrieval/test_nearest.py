import pytest
import torch

from clpl_moe.evaluate import evaluate
from clpl_moe.mine import mine
from clpl_moe.retrieval import search as module
from clpl_moe.retrieval import store
from clpl_moe.retrieval.nearest import search_jointly
from clpl_moe.retrieval.search import parts, search
from helpers.mining import make_collection
from helpers.processes import run_in_processes

SHORT = {"query_max_len": 60, "passage_max_len": 100, "dtype": "float32"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)
    monkeypatch.setattr(store, "SHARD_TEXTS", 4)


def whole_numbers(rows, seed):
    """Vectors many of whose dot products are equal."""
    return torch.randint(-2, 3, (rows, 4), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(("length", "count"), [(0, 2), (1, 3), (7, 1), (8, 3), (9, 3), (31, 4)])
def test_parts_are_whole_chunks(length, count):
    found = parts(length, count)
    assert len(found) == count
    assert [row for part in found for row in part] == list(range(length))
    assert all(part.start % 3 == 0 or len(part) == 0 for part in found)


def test_a_search_of_some_rows():
    queries, passages = whole_numbers(5, 0), whole_numbers(20, 1)
    scores, indices = search(queries, passages, 4, rows=range(6, 15))
    expected = search(queries, passages[6:15], 4)
    assert torch.equal(scores, expected[0])
    assert torch.equal(indices, expected[1] + 6)


class Work:
    """Of three processes: search jointly, then evaluate and mine."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder

    def __call__(self, rank):
        module.CHUNK, store.SHARD_TEXTS = 3, 4
        queries, passages = whole_numbers(5, 0), whole_numbers(20, 1)
        found = [search_jointly(queries if rank == 0 else None, passages[:n], 6 * (rank == 0)) for n in (20, 7, 2, 0)]
        run(self.model, self.folder, self.folder / "three")
        return found


def run(model, folder, output):
    options = {"model": model, "collection": folder / "data", **SHORT}
    evaluate(**options | {"model": [model]}, languages=["ko"], output=output / "results", split="train")
    mine(**options, language="ko", output=output / "train.jsonl", rank_to=8, negatives=4, max_positive_ratio=0)


@pytest.mark.slow
def test_processes_find_what_one_finds(tiny_encoder, tmp_path):
    make_collection(tmp_path / "data")
    found = run_in_processes(Work(tiny_encoder, tmp_path), tmp_path, 3)[0]
    for n, (scores, indices) in zip((20, 7, 2, 0), found):
        expected = search(whole_numbers(5, 0), whole_numbers(20, 1)[:n], 6)
        assert torch.equal(scores, expected[0])
        assert torch.equal(indices, expected[1])
    run(tiny_encoder, tmp_path, tmp_path / "one")
    for name in ("results/ko/run.trec", "results/per_query.csv", "train.jsonl"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert not (tmp_path / "three" / ".train.jsonl.clpl_moe").exists()
