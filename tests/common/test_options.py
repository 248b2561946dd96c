from dataclasses import dataclass, fields

import pytest

from clpl_moe.common.cli import make_parser
from clpl_moe.common.errors import OptionError
from clpl_moe.common.options import Bounds, check_bounds, check_needs, given, option, refuse_given


@dataclass
class Options:
    name: str = option("a name")
    weight: float | None = option("in kilograms", 1.5, least=0)
    parts: list[int] = option("their numbers", [1], least=1, most=4096)
    limit: float = option("Of length.", 3.0, most=10)

    def __post_init__(self):
        check_bounds(self)


def test_an_option_has_help_and_a_default_or_is_required():
    assert Options("x") == Options("x", 1.5, [1])
    assert Options("x").parts is not Options("x").parts
    assert Options.__dataclass_fields__["name"].metadata["help"] == "a name"
    with pytest.raises(TypeError, match="missing 1 required"):
        Options()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": -1}, "weight: found -1, expected at least 0"),
        ({"weight": float("nan")}, "weight: found nan, expected at least 0"),
        ({"weight": float("inf")}, "weight: found inf, expected a finite number"),
        ({"parts": [2, 0]}, "parts: found 0, expected at least 1"),
        ({"parts": [2, 4097]}, "parts: found 4097, expected at most 4,096"),
        ({"limit": float("-inf")}, "limit: found -inf, expected a finite number"),
        ({"limit": 1e308}, "limit: found 1e.308, expected at most 10"),
    ],
)
def test_a_number_out_of_its_bounds_is_refused(values, message):
    with pytest.raises(OptionError, match=message):
        Options("x", **values)


def test_a_whole_number_may_be_larger_than_any_float():
    assert Options("x", weight=10**400).weight == 10**400


def test_bounds_stand_in_the_help_and_reach_the_parser():
    assert Options("x", weight=None).weight is None
    helps = {field.name: field.metadata["help"] for field in fields(Options)}
    assert helps["weight"] == "in kilograms (at least 0)"
    assert helps["parts"] == "their numbers (1 to 4,096)"
    assert helps["limit"] == "Of length (at most 10)."
    parser = make_parser([Options], "clpl_moe.x", "")
    assert "their numbers (1 to 4,096)" in " ".join(parser.format_help().split())
    assert parser.parse_args(["--name", "x", "--parts", "3", "4"]).parts == [3, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": [2], "weight": None}, "^parts: goes with weight, which is not set$"),
        ({"limit": 2.0}, "^limit: goes with name y, not with x$"),
        ({"limit": 3.0, "parts": [2]}, None),  # the default
        ({"limit": 2.0, "name": "y"}, None),
    ],
)
def test_options_that_go_with_another_one(values, message):
    options = Options(**{"name": "x"} | values)
    needs = {"parts": "weight", "limit": "name y"}
    if message is None:
        check_needs(options, needs)
    else:
        with pytest.raises(OptionError, match=message):
            check_needs(options, needs)


def test_options_that_were_given():
    options = Options("x", parts=[2], limit=2)
    assert list(given(options)) == ["parts", "limit"]
    with pytest.raises(OptionError, match="^limit: goes with other, which is not set$"):
        refuse_given(options, "other", but=["parts"])
    refuse_given(Options("x"), "other")


def test_bounds_of_options_that_are_declared_elsewhere():
    with pytest.raises(OptionError, match="name_length: found 3, expected at most 2"):
        check_bounds(_Inherited(), {"name_length": Bounds(1, 2)})


@dataclass
class _Inherited:
    name_length: int = 3
