import pytest
import torch

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_jsonl
from clpl_moe.encoder import Encoder
from clpl_moe.evaluate.evaluation import evaluate_retrieval
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments


def test_a_query_does_not_find_itself(tiny_encoder, tmp_path):
    """As in BEIR; but where it is judged relevant, or the passage only has the same id."""
    folder = tmp_path / "ko"
    texts = {"a": "apple brick cloud", "b": "drum eagle flame", "c": "grape honey ivory", "d": "a b c"}
    write_jsonl(folder / "corpus.jsonl", ({"id": k, "title": "title", "text": v} for k, v in texts.items()))
    queries = {"a": texts["a"], "b": texts["b"], "d": "something else"}
    write_jsonl(folder / "dev_queries.jsonl", ({"id": k, "text": v} for k, v in queries.items()))
    qrels = [("a", "b"), ("b", "b"), ("d", "a")]
    write_jsonl(folder / "dev_qrels.jsonl", ({"qid": q, "docid": p, "relevance": 1} for q, p in qrels))
    collection = Collection.load(tmp_path, "ko", "dev")
    assert collection.own_passages() == {"a": 0}
    for top_k in (2, 10):
        encoder = Encoder.load(tiny_encoder)
        found = evaluate_retrieval(encoder, collection, EncodingArguments(passage_max_len=50), top_k=top_k).run
        assert "a" not in found["a"]
        assert [len(found[q]) for q in queries] == ([2, 2, 2] if top_k == 2 else [3, 4, 4])


def test_result_of_the_function(tiny_encoder, collections):
    encoder = Encoder.load(tiny_encoder, compute_dtype=torch.float32)
    collection = Collection.load(collections, "fa", "dev")
    encoding = EncodingArguments(query_max_len=50, passage_max_len=100)
    result = evaluate_retrieval(encoder, collection, encoding, progress=False)
    assert set(result.metrics) == {"nDCG@5", "nDCG@10", "R@100"}
    assert result.metrics["nDCG@5"] == pytest.approx(sum(v["nDCG@5"] for v in result.per_query.values()) / 8)
    ranked = list(result.run["q0"].items())
    assert len(ranked) == len(collection.passages)
    assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[:] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite embeddings"):
        evaluate_retrieval(encoder, collection, encoding)
