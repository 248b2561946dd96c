from dataclasses import dataclass

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.prepare import Prepared, Source, prepare, register_source
from clpl_moe.retrieval.collection import Collection
from helpers.squad_files import many, squad


def test_called_from_python(tmp_path, capsys):
    file = squad(tmp_path / "a.json", *many(5))
    prepared = prepare(squad=[file], language="ko", output=tmp_path, dev_share=0.4, titles=False)
    assert isinstance(prepared, Prepared)
    assert prepared.folder == tmp_path / "ko"
    assert prepared.counts["dev articles"] == 2
    assert len(Collection.load(tmp_path, "ko", "train").queries) == prepared.counts["train queries"]
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="output folder is not empty"):
        prepare(squad=[file], language="ko", output=tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "found none, set one of beir, "),
        ({"beir": "x"}, "language: missing, expected the name"),
        ({"squad": ["x"], "language": "ko", "dev_share": 2}, "dev_share: found 2.0"),
        ({"beir": "x", "language": "ko", "seed": 1}, "seed: goes with squad, not with beir"),
        ({"bier": "x"}, r"^prepare\(\): unknown argument 'bier'; did you mean 'beir'"),
    ],
)
def test_mistakes_name_the_argument(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        prepare(output=tmp_path, **options)


def test_a_source_is_checked_as_it_is_registered():
    def register(name, annotations, **defaults):
        body = {"__annotations__": dict.fromkeys(annotations.split(), str), **defaults}
        return register_source(name)(dataclass(type("Other", (Source,), body)))

    for name, annotations, defaults, words in (
        ("nothing", "beir", {}, "expected a dataclass with a field 'nothing'"),
        ("beir", "beir", {}, "there is a source 'beir' already, Beir"),
        ("x", "x y", {}, "expected a default for option 'y'"),
        ("y", "y beir", {"y": "", "beir": "a"}, "option 'beir' has another default in source 'beir'"),
        ("y", "y seed", {"y": "", "seed": "1"}, "option 'seed' has another default in source 'squad'"),
    ):
        with pytest.raises(ValueError, match=words):
            register(name, annotations, **defaults)
