from pathlib import Path

from clpl_moe.validate.reading import Reading
from clpl_moe.validate.report import Figures, FileReport, table


def test_scripts_are_counted_over_all_blocks(monkeypatch):
    monkeypatch.setattr("clpl_moe.validate.report._BLOCK", 4)
    figures = Figures(Reading())
    for number, text in enumerate(("ab 1", "가나다", "𐎠", "é"), 1):
        figures.add(number, {"query": text, "pos": [text * 2], "neg": ["x"]})
    figures.flush()
    assert figures.letters["query"] == {"Latin": 3, "Hangul": 3, "Old": 1}
    assert figures.letters["pos"] == {"Latin": 6, "Hangul": 6, "Old": 2}
    assert list(figures.lengths["pos"]) == [8, 6, 2, 2]
    assert not figures.letters["neg_q"]
    assert not Figures(Reading()).letters["neg"]


def test_a_file_without_a_good_line_has_a_table():
    rows = list(table(FileReport(Path("t.jsonl"), 2, 1, figures=Figures(Reading()))))
    assert rows == ["  examples  0", "  faults    2 in 1 line, which the rest of this table leaves out"]
    assert not list(table(FileReport(Path("t.jsonl"), 1)))
