"""Collections, results before and after a run, and the run's course, as a report takes them."""

from pathlib import Path

from clpl_moe.common.files import write_json, write_jsonl
from clpl_moe.evaluate.metrics import write_trec_run
from clpl_moe.retrieval.collection import Collection

TEXTS = {
    "ko": ["서울의 궁궐은 <b>조선</b> 시대에 지어졌다.", "부산은 바다에 접한 도시이다.", "한글은 세종이 만들었다."],
    "fa": ["تهران پایتخت ایران است.", "می‌خواهم به اصفهان بروم.", "شیراز شهر شعر است."],
    "hi": ["दिल्ली भारत की राजधानी है।", "गंगा एक नदी है।", "हिन्दी देवनागरी में लिखी जाती है।"],
}


def make_data(tmp_path: Path) -> Path:
    """Collections in three scripts, results before and after a run, and the run's course. Query 0 is gained, 1 lost, 2 the same."""
    for language, texts in TEXTS.items():
        folder = tmp_path / "data" / language
        write_jsonl(folder / "corpus.jsonl", ({"id": f"p{i}", "text": text} for i, text in enumerate(texts)))
        write_jsonl(folder / "dev_queries.jsonl", ({"id": f"q{i}", "text": f"{t[:6]}?"} for i, t in enumerate(texts)))
        write_jsonl(folder / "dev_qrels.jsonl", ({"qid": f"q{i}", "docid": f"p{i}", "relevance": 1} for i in range(3)))
        collection = Collection.load(tmp_path / "data", language, "dev")
        runs = {
            "before": {"q0": ["p1", "p0"], "q1": ["p1", "p2"], "q2": ["p2"]},
            "after": {"q0": ["p0", "p1"], "q1": ["p2", "p0"], "q2": ["p2"]},
        }
        for name, run in runs.items():
            scores = {query: {p: 1.0 - rank / 10 for rank, p in enumerate(found)} for query, found in run.items()}
            write_trec_run(tmp_path / name / language / "run.trec", scores, name)
            about = {"collection": str(tmp_path / "data"), "collection_hash": collection.fingerprint(), "split": "dev"}
            write_json(tmp_path / name / language / "metrics.json", {"metrics": {}, **about})
    records = [
        {"step": 0, "eval_ndcg@5": 0.5, "eval_ndcg@10": 0.6},
        *(
            {"step": s, "loss": 1 / s, "contrastive": 1 / s, "penalty": 0.1, "learning_rate": 1e-5, "grad_norm": 2.0, "z": 0.0,
             "expert_load": [[0.25, 0.75], [0.5, 0.5]]}
            for s in (1, 2, 3)
        ),
        {"step": 3, "eval_ndcg@5": 0.7, "eval_ndcg@10": 0.8},
        {"step": 3, "train_runtime": 120.0},
    ]  # fmt: skip
    write_jsonl(tmp_path / "run" / "metrics.jsonl", records)
    moe = {"layers": "8,10", "num_experts": 2, "top_k": 1}
    write_json(tmp_path / "run" / "config.json", {"moe": moe, "num_hidden_layers": 12})
    (tmp_path / "run" / "train_config.yaml").write_text("model_name_or_path: base <model>\nlearning_rate: 1.0e-05\n")
    return tmp_path
