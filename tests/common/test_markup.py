import ast
import csv
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clpl_moe.common.markup import as_code, as_python, csv_writer, from_csv, in_markdown, to_csv

FORMULA = "=cmd|'/c calc'!A1"


@given(st.text())
@example(FORMULA)
@example(f"'{FORMULA}")
@example(f"''{FORMULA}")
@example("\t=1")
def test_a_cell_is_no_formula_and_gives_its_text_back(text):
    cell = to_csv(text)
    assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r")
    assert from_csv(cell) == text


def test_what_is_no_formula_stays_as_it_is():
    for text in ("서울", "a=b", "'quoted'", "3", ""):
        assert to_csv(text) == from_csv(text) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\"]);__import__('os').system('id')#\n")
def test_a_string_of_python_is_one_line_with_its_text(text):
    code = as_python(text)
    assert "\n" not in code
    assert ast.literal_eval(code) == text


@pytest.mark.parametrize(
    ("text", "code", "markdown"),
    [
        ("my data.jsonl", "`my data.jsonl`", "my data.jsonl"),
        ("a_b* | <b>", "`a_b* \\| <b>`", "a_b\\* \\| \\<b\\>"),
        ("a`b", "``a`b``", "a\\`b"),
        ("`a`", "`` `a` ``", "\\`a\\`"),
        ("one\n# two", "`one # two`", "one # two"),
        ("[x](y)", "`[x](y)`", "\\[x\\](y)"),
    ],
)
def test_markdown(text, code, markdown):
    assert as_code(text) == code
    assert in_markdown(text) == markdown


@given(
    st.lists(st.lists(st.text(st.characters(exclude_characters="\0")), min_size=2, max_size=2)), st.sampled_from(",\t")
)
@example([[FORMULA, "a,b"], ["a\rb", "c\r"], ["\r\n", ""], ["\u2028", '"\t']], ",")
def test_rows_are_read_back_by_csv(rows, delimiter):
    file = io.StringIO()
    csv_writer(file, delimiter).writerows(rows)
    # Without translation, as files are opened.
    assert list(csv.reader(io.StringIO(file.getvalue(), newline=""), delimiter=delimiter)) == rows
    assert file.getvalue().count("\n") == sum(cell.count("\n") for row in rows for cell in row) + len(rows)
