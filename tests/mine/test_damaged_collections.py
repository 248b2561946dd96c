import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clpl_moe.common.files import read_jsonl
from clpl_moe.mine.__main__ import main
from helpers.damage import contents, damaged, ends_well
from helpers.mining import make_collection

FILES = ("corpus.jsonl", "train_queries.jsonl", "train_qrels.jsonl", "positive_queries.jsonl")


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_damaged_collection_is_mined_or_told_of(data):
    with tempfile.TemporaryDirectory() as name:
        folder = make_collection(Path(name) / "data", positive_queries={"p3": ["a question", "another"]})
        path = folder / "ko" / data.draw(st.sampled_from(FILES))
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        before = contents(folder)
        output = Path(name) / "out" / "train.jsonl"
        argv = ["--model=none", "--collection", folder, "--language=ko", "--output", output, "--sampling=corpus"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they tell of gaps
            code = ends_well(main, argv)
        assert contents(folder) == before
        assert sorted(contents(Path(name))) == sorted(
            [*(f"data/{p}" for p in before), "data", *(["out", "out/train.jsonl"] if code == 0 else [])]
        )
        if code == 0:
            assert list(read_jsonl(output))
