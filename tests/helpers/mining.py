"""A collection of two-word passages, for mining."""

from clpl_moe.common.files import write_jsonl

WORDS = ["apple", "brick", "cloud", "drum", "eagle", "flame", "grape", "honey"]
WORDS += ["ivory", "jolly", "kayak", "lemon", "mango", "noble", "ocean", "piano"]
PASSAGES = {f"p{i}": f"{a} {b} {i}" for i, (a, b) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1]))}
QUERIES = {f"q{i}": f"what about {word}" for i, word in enumerate(WORDS[:6])}
QRELS = {f"q{i}": {f"p{i}": 1, f"p{i + 1}": 0} for i in range(6)}


def make_collection(folder, passages=PASSAGES, queries=QUERIES, qrels=QRELS, positive_queries=None, splits=None):
    folder = folder / "ko"
    splits = splits or {}
    lines = ({"id": k, "text": v, "split": splits.get(k)} for k, v in passages.items())
    write_jsonl(folder / "corpus.jsonl", lines)
    write_jsonl(folder / "train_queries.jsonl", ({"id": k, "text": v} for k, v in queries.items()))
    judged = ((q, p, r) for q, judgements in qrels.items() for p, r in judgements.items())
    write_jsonl(folder / "train_qrels.jsonl", ({"qid": q, "docid": p, "relevance": r} for q, p, r in judged))
    if positive_queries:
        lines = ({"docid": p, "queries": texts} for p, texts in positive_queries.items())
        write_jsonl(folder / "positive_queries.jsonl", lines)
    return folder.parent
