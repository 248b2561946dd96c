"""A collection of two-word passages, and mining from it."""

from clpl_moe.common.files import read_jsonl, write_jsonl
from clpl_moe.mine.__main__ import main

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


def mine_by_command(model, folder, **options):
    """The lines that ``mine`` writes, by query id."""
    options = {
        "rank_from": 1,
        "rank_to": 8,
        "negatives": 4,
        "max_positive_ratio": 0,
        "max_overlap": 1,
        "passage_max_len": 100,
        "dtype": "float32",
    } | options
    output = folder / "train.jsonl"
    argv = ["--model", str(model), "--collection", str(folder), "--language", "ko", "--output", str(output)]
    main(argv + [f"--{key}={value}" for key, value in options.items()])
    return {record["query_id"]: record for _, record in read_jsonl(output)}
