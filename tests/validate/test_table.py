from pathlib import Path

from clpl_moe.validate.reading import Reading
from clpl_moe.validate.report import Figures, FileReport
from clpl_moe.validate.table import table


def test_a_file_without_a_good_line_has_a_table():
    rows = list(table(FileReport(Path("t.jsonl"), 2, 1, figures=Figures(Reading()))))
    assert rows == ["  examples  0", "  faults    2 in 1 lines, which the rest of this table leaves out"]
    assert not list(table(FileReport(Path("t.jsonl"), 1)))
