"""Libraries that take our embeddings, rankings or folders, where they are installed: scripts/test_tools.sh installs them."""

import pytest
import torch

from clpl_moe import Encoder
from clpl_moe.encoder.settings import EmbeddingSettings
from clpl_moe.evaluate.metrics import evaluate_run, write_trec_qrels, write_trec_run
from clpl_moe.retrieval.search import search
from helpers.tools import need_tool
from helpers.trained_tokenizers import COVERED, OTHER

PASSAGES = COVERED + OTHER
QUERIES = [text[:12] for text in PASSAGES]
QRELS = {f"q{n}": {f"p{n}": 1, f"p{(n + 3) % len(PASSAGES)}": 2} for n in range(len(QUERIES))}
METRICS = ["nDCG@3", "R@3", "RR"]


@pytest.fixture(scope="module")
def encoder(tiny_encoder, tmp_path_factory):
    encoder = Encoder.load(tiny_encoder, device="cpu", compute_dtype=torch.float32)
    encoder.settings = EmbeddingSettings("mean", True, "query: ", "passage: ")
    encoder.max_length = 100
    folder = tmp_path_factory.mktemp("search") / "model"
    encoder.save(folder)
    return folder, encoder.encode_queries(QUERIES), encoder.encode_passages(PASSAGES)


@pytest.fixture(scope="module")
def run(encoder):
    scores, places = search(*encoder[1:], 5)
    return {
        f"q{n}": {f"p{place}": score for place, score in zip(*row)}
        for n, row in enumerate(zip(places.tolist(), scores.tolist()))
    }


def test_ranx_scores_our_files_as_we_do(run, tmp_path):
    ranx = need_tool("ranx")
    write_trec_run(tmp_path / "run.trec", run, "ours")
    write_trec_qrels(tmp_path / "qrels.trec", QRELS)
    found = ranx.evaluate(
        ranx.Qrels.from_file(str(tmp_path / "qrels.trec"), kind="trec"),
        ranx.Run.from_file(str(tmp_path / "run.trec"), kind="trec"),
        ["ndcg@3", "recall@3", "mrr"],
    )
    assert list(found.values()) == pytest.approx(list(evaluate_run(QRELS, run, METRICS)[0].values()), abs=1e-6)


def test_beir_scores_our_ranking_as_we_do(run):
    evaluation = need_tool("beir.retrieval.evaluation")
    ndcg, _, recall, _ = evaluation.EvaluateRetrieval.evaluate(QRELS, run, [3])
    ours = evaluate_run(QRELS, run, METRICS)[0]
    assert [ndcg["NDCG@3"], recall["Recall@3"]] == pytest.approx([ours["nDCG@3"], ours["R@3"]], abs=1e-5)


def test_mteb_puts_each_sides_prompt_in_front(encoder):
    mteb = need_tool("mteb")
    from datasets import Dataset
    from mteb.models import SentenceTransformerEncoderWrapper
    from mteb.types import PromptType
    from torch.utils.data import DataLoader

    folder, *ours = encoder
    model = SentenceTransformerEncoderWrapper(str(folder), device="cpu")
    task = mteb.get_task("SciFact").metadata
    sides = zip((PromptType.query, PromptType.document), (QUERIES, PASSAGES), ours)
    for side, texts, expected in sides:
        batches = DataLoader(Dataset.from_dict({"text": texts}), batch_size=4)
        found = model.encode(batches, task_metadata=task, hf_split="test", hf_subset="default", prompt_type=side)
        torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-3, atol=1e-4)


def test_qdrant_finds_what_we_find(encoder, run):
    qdrant = need_tool("qdrant_client")
    _, queries, passages = encoder
    client = qdrant.QdrantClient(":memory:")
    size = qdrant.models.VectorParams(size=passages.shape[1], distance=qdrant.models.Distance.COSINE)
    client.create_collection("passages", vectors_config=size)
    client.upsert("passages", [qdrant.models.PointStruct(id=n, vector=v) for n, v in enumerate(passages.tolist())])
    for query, vector in zip(run, queries.tolist()):
        found = client.query_points("passages", query=vector, limit=5).points
        assert [point.score for point in found] == pytest.approx(list(run[query].values()), abs=1e-5)
        assert f"p{found[0].id}" == next(iter(run[query]))


def test_txtai_has_the_prompts_from_the_folder(encoder):
    txtai = need_tool("txtai")
    folder, *ours = encoder
    model = txtai.Embeddings(path=str(folder), method="sentence-transformers", gpu=False)
    for side, texts, expected in zip(("query", "data"), (QUERIES, PASSAGES), ours):
        found = torch.as_tensor(model.batchtransform(texts, side))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
