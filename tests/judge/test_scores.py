import numpy as np
import pytest
import torch

from clpl_moe import Encoder
from clpl_moe.common.files import read_jsonl
from clpl_moe.judge.__main__ import main
from helpers.judging import asked, line, train_file
from helpers.synthesis import arguments

pytest.importorskip("openai")


def test_an_encoder_computes_the_scores(llm, tiny_encoder, tmp_path):
    """In the place of those in the file; its embeddings are gone at the end."""
    server = llm()
    records = [line(n, "no", "no", "no", scores=[0, 0, 0]) for n in range(1, 5)]
    for number, record in enumerate(records):
        record["neg"][number % 3] += " 아주 다른 말이 더 있는 글" * 5
        del record["pos_scores"], record["neg_scores"]
    path = train_file(tmp_path, records)
    encoder = Encoder.load(tiny_encoder, compute_dtype=torch.float32)
    expected, scores = set(), []
    for record in (record for _, record in read_jsonl(path)):
        embeddings = encoder.encode_passages([*record["pos"], *record["neg"]], max_length=100)
        found = (embeddings @ encoder.encode_queries([record["query"]], max_length=100)[0]).tolist()
        scores.append((found[0], found[1:], record["neg_ids"]))
    differences = sorted(positive - score for positive, negatives, _ in scores for score in negatives)
    middle = len(differences) // 2
    margin = max(float(np.mean(differences[middle : middle + 2])), 0)
    for positive, negatives, ids in scores:
        expected |= {i for i, score in zip(ids, negatives) if score >= positive - margin}
    assert 0 < len(expected) < 12
    options = {"score_model": tiny_encoder, "margin": margin, "query_max_len": 100, "passage_max_len": 100}
    main(arguments(server, path, tmp_path, **options, dtype="float32"))
    assert {f"p{passage}" for _, passage in asked(server)} == expected
    names = {"out.jsonl", "out.journal.jsonl", "out.verdicts.jsonl", "train.jsonl", "server0"}
    assert {file.name for file in tmp_path.iterdir()} == names
