import math

import pytest

from clpl_moe.common.errors import OptionError
from clpl_moe.mine.options import SelectionArguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_positive_ratio": -0.1}, "^max_positive_ratio: found -0.1"),
        ({"margin": math.nan}, "^margin: found nan"),
        ({"max_overlap": 0}, "^max_overlap: found 0"),
        ({"sampling_temperature": 0}, "^sampling_temperature: found 0"),
    ],
)
def test_ill_defined_options(options, words):
    with pytest.raises(OptionError, match=words):
        SelectionArguments(**options)
