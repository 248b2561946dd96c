from clpl_moe.common.files import write_jsonl
from clpl_moe.validate import validate
from clpl_moe.validate.__main__ import main
from clpl_moe.validate.answers import (
    ELSEWHERE,
    ITSELF,
    OTHER_BYTES,
    OTHER_POSITIVES,
    POSITIVE,
    SHARED,
    SINGLE,
    TWICE,
    Answers,
)

LINES = [
    {"query": "무엇", "pos": ["하나"], "neg": ["\u1112\u1161\u1102\u1161", "둘", "둘"]},
    {"query": "کجا", "pos": ["کتاب یک"], "neg": ["\u0643تاب \u064a\u0643", "کتاب یک", "دو", "سه"]},
    {"query": "کجا ?", "pos": ["دو"], "neg": ["کجا", "سه", "چهار"]},
    {"query": "who", "pos": ["she", "he"], "neg": ["a", "b"], "neg_q": [["what"], None]},
    {"query": "what", "pos": ["it", "She"], "neg": ["A.", "c", "b"]},
]


def test_every_kind_is_counted_by_script(tmp_path, capsys):
    write_jsonl(tmp_path / "t.jsonl", LINES)
    (report,) = validate(train_data=[str(tmp_path / "t.jsonl")]).files
    answers = report.figures.answers
    assert report.faults == 0
    assert answers.counts == {
        OTHER_POSITIVES: 1,
        POSITIVE: 3,
        OTHER_BYTES: 1,  # NFC makes the Korean one equal
        ELSEWHERE: 2,  # the positive of line 3 in line 2; by the query in line 4, the negative in line 5
        ITSELF: 1,
        TWICE: 2,
        SINGLE: 1,
        SHARED: 2,
    }
    assert answers.first == {
        OTHER_POSITIVES: 3,
        POSITIVE: 1,
        OTHER_BYTES: 2,
        ELSEWHERE: 2,
        ITSELF: 3,
        TWICE: 1,
        SINGLE: 1,
        SHARED: 4,
    }
    assert answers.scripts[POSITIVE] == {"Hangul": 1, "Arabic": 2}
    assert answers.scripts[ELSEWHERE] == {"Arabic": 1, "Latin": 1}
    main([str(tmp_path / "t.jsonl")])
    rows = dict(row.strip().split("  ", 1) for row in capsys.readouterr().out.splitlines() if row.startswith("  neg"))
    assert rows[POSITIVE].strip() == "3 (Arabic 2, Hangul 1), first in line 1"


def test_answers_in_other_files(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [{"query": "who", "pos": ["she"], "neg": ["he", "it"]}])
    write_jsonl(tmp_path / "b.jsonl", [{"query": "Who?", "pos": ["he"], "neg": ["m", "n"]}])
    validation = validate(train_data=[str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")])
    assert validation.answers_in_other_files == 1
    assert [report.figures.answers.counts[ELSEWHERE] for report in validation.files] == [0, 0]
    main([str(tmp_path)])
    assert capsys.readouterr().out.endswith("negatives that another file knows to answer their query: 1\n")


def test_without_lines_there_is_nothing():
    answers = Answers()
    answers.close()
    assert not +answers.counts
    assert answers.known[0].size == 0
