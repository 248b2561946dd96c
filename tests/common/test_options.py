from dataclasses import dataclass

import pytest

from clpl_moe.common.options import option


@dataclass
class Options:
    name: str = option("a name")
    weight: float | None = option("in kilograms", 1.5)
    parts: list[int] = option("their numbers", [1])


def test_an_option_has_help_and_a_default_or_is_required():
    assert Options("x") == Options("x", 1.5, [1])
    assert Options("x").parts is not Options("x").parts
    assert Options.__dataclass_fields__["weight"].metadata["help"] == "in kilograms"
    with pytest.raises(TypeError, match="missing 1 required"):
        Options()
