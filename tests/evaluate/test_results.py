import json
import warnings

import pytest

from clpl_moe.common.files import write_jsonl
from clpl_moe.evaluate.metrics import EVALUATION_METRICS, evaluate_run, read_trec_run
from clpl_moe.retrieval.collection import Collection
from helpers.evaluating import changed_copy, read_csv, run


def test_values_of_each_query(tiny_encoder, collections, tmp_path):
    queries = collections / "ko" / "dev_queries.jsonl"
    records = [json.loads(line) for line in queries.read_text().splitlines()]
    records[3]["text"] = 'the "red", house\nof 한국어'
    write_jsonl(queries, records[::-1])
    (collections / "ko" / "dev_qrels.jsonl").write_text(
        "".join(
            f'{{"qid": "q{i}", "docid": "{d}", "relevance": {r}}}\n'
            for i, d, r in [(3, "p3", 1), (1, "gone", 2), (2, "p2", 0)]
        )
    )
    second = changed_copy(tiny_encoder, tmp_path / "second")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are those of the collection
        run([tiny_encoder, second], collections, tmp_path / "out", languages=("fa", "ko"))
    rows = read_csv(tmp_path / "out" / "per_query.csv")
    assert [(row["language"], row["query_id"]) for row in rows[-3:]] == [("ko", "q3"), ("ko", "q2"), ("ko", "q1")]
    assert len(rows) == 8 + 3  # the judged ones
    assert rows[8]["query"] == records[3]["text"]
    assert list(rows[0])[3:7] == ["nDCG@5 tiny", "nDCG@5 second", "nDCG@10 tiny", "nDCG@10 second"]
    for label in ("tiny", "second"):
        for language in ("fa", "ko"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                qrels = Collection.load(collections, language, "dev").qrels
            ranked = read_trec_run(tmp_path / "out" / label / language / "run.trec")
            means, per_query = evaluate_run(qrels, ranked, EVALUATION_METRICS)
            own = [row for row in rows if row["language"] == language]
            for name in EVALUATION_METRICS:
                assert {row["query_id"]: float(row[f"{name} {label}"]) for row in own} == {
                    query_id: values[name] for query_id, values in per_query.items()
                }
            content = json.loads((tmp_path / "out" / label / language / "metrics.json").read_text())
            assert content["metrics"] == means
    # A query without a relevant passage in the corpus, or at all.
    assert {row["R@1000 tiny"] for row in rows[-2:]} == {"0.0"}


@pytest.mark.parametrize("content", ["my,own,table\n", "x" * 200_000])
def test_a_table_of_something_else_is_not_replaced(tiny_encoder, collections, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "per_query.csv").write_text(content)
    with pytest.raises(SystemExit):
        run(tiny_encoder, collections, tmp_path / "out")
    assert "per_query.csv: found another file" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["per_query.csv"]
