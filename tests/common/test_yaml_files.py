import re

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.common.yaml_files import load_yaml, write_yaml

DIGITS = "9" * 5_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2020-13-45", "c.yaml:2: not valid YAML: found '2020-13-45', expected a date; in quotes it is text"),
        ("a: !!int abc", "found 'abc', expected a whole number"),
        ("a: !!int ''", "found '', expected a whole number"),
        ("a: !!float abc", "found 'abc', expected a number"),
        ("a: !!bool abc", "found 'abc', expected true or false"),
        ("a: !!timestamp abc", "found 'abc', expected a date"),
        ("a: 0x_", "found '0x_', expected a whole number"),
        (f"a: {DIGITS}", "expected a whole number"),
        (f"a: 0x{DIGITS}", "expected a whole number"),
        ("a: " + "[" * 3_000 + "]" * 3_000, "nested too deeply"),
        ("a: " + "[" * 30 + "]" * 30, "field 'a': nested too deeply"),
        ("a: &x [*x]", "field 'a': nested too deeply, or an alias (*) that stands within itself"),
        ("a: &x {b: *x}", "field 'a': nested too deeply"),
        ("a: &x [*x, *x]", "field 'a': nested too deeply"),
        ("a: &a [1, 1]\n" + "\n".join(f"{x}: &{x} [{', '.join([f'*{y}'] * 9)}]" for x, y in zip("bcdefgh", "abcdefg")),
         "nested too deeply"),
        ("2020-01-01: 3", "found 2020-01-01, expected a name; put it into quotes"),
        ("a: {2020-01-01: 3}", "field 'a': found 2020-01-01, expected a name; put it into quotes"),
        ('a: {"\\x1e\\ud800": 3}', "field 'a': found '\\x1e\\ud800', expected a name"),
        ("no: 3", "found False, expected a name; put it into quotes"),
        ("a: {~: 3}", "found None, expected a name"),
        ("a: !!set {b}", "field 'a': found a set, expected a value, a list or a mapping"),
        ("a: !!binary eA==", "field 'a': found a bytes"),
        ('a: "b\\0c"', "field 'a': found 'b\\x00c', expected text without NUL"),
        ('a: ["\\ud800"]', "field 'a': found"),
        ("a: !!python/object/apply:os.system [id]", "not valid YAML: could not determine a constructor"),
    ],
)  # fmt: skip
def test_what_is_no_value_is_told_by_file_and_field(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_yaml(tmp_path / "c.yaml")
    assert str(error.value).startswith(str(tmp_path / "c.yaml"))
    assert len(str(error.value)) < len(str(tmp_path)) + 200


def test_plain_values_and_dates_stay(tmp_path):
    text = "a: 1e-5\nb: [2020-01-01, x]\nc: {1: y, z: null}\nd: &d [1]\ne: *d"
    (tmp_path / "c.yaml").write_text(text)
    values = load_yaml(tmp_path / "c.yaml")
    assert values["a"] == 1e-5
    assert [str(value) for value in values["b"]] == ["2020-01-01", "x"]
    assert (values["c"], values["d"], values["e"]) == ({1: "y", "z": None}, [1], [1])


def test_numbers_are_those_that_people_write(tmp_path):
    """YAML 1.1 also has octal numbers, which begin with a zero, and those of base 60."""
    (tmp_path / "c.yaml").write_text("a: [0, -3, 1_000, 0x10, 1e3, 0.5, .inf]\nb: [0123456, 00, 1:30, 190:20]")
    values = load_yaml(tmp_path / "c.yaml")
    assert values == {"a": [0, -3, 1000, 16, 1e3, 0.5, float("inf")], "b": ["0123456", "00", "1:30", "190:20"]}


def test_what_is_written_is_read_again(tmp_path):
    values = {
        "text": ["0123456", "12345e6", "1e-5", "1.10", "no", "2024-1-5", "한국어", ""],
        "number": [1e-5, 1e20, 3, True],
    }
    write_yaml(tmp_path / "c.yaml", values)
    found = load_yaml(tmp_path / "c.yaml")
    assert found == values
    assert list(map(type, found["text"])) == [str] * 8
