import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_json
from clpl_moe.report.card import card


def write_results(folder, language, value, collection_hash="same"):
    about = {"collection": "data/miracl", "collection_hash": collection_hash, "language": language, "split": "dev"}
    write_json(folder / language / "metrics.json", {"metrics": {"nDCG@5": value}, **about})


def test_called_from_python(tmp_path, capsys):
    (tmp_path / "README.md").write_text("---\ntags: []\n---\n<!-- results -->\n<!-- end of results -->\n")
    for name, value in (("before", 0.25), ("after", 0.5)):
        write_results(tmp_path / name, "ko", value)
    (result,) = card(run=tmp_path, after=tmp_path / "after", before=tmp_path / "before")
    assert (result.collection, result.language, result.split) == ("miracl", "ko", "dev")
    assert (result.metrics, result.before) == ({"nDCG@5": 0.5}, {"nDCG@5": 0.25})
    assert "| after training | 0.5000 |" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="unknown argument 'bevore'; did you mean 'before'"):
        card(run=tmp_path, after=tmp_path / "after", bevore=tmp_path)
    with pytest.raises(UserError, match=r"run/README\.md: no such file; expected the card of a run"):
        card(run=tmp_path / "run", after=tmp_path / "after")
    (tmp_path / "after" / "ko" / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match="not the results of clpl_moe.evaluate"):
        card(run=tmp_path, after=tmp_path / "after")


@pytest.mark.parametrize("value", [{}, {"nDCG@5": 0.5}])
def test_scores_in_place_of_a_number_are_refused(tmp_path, value):
    """Only the file of the heads' scores has numbers of each."""
    write_results(tmp_path / "after", "ko", value)
    with pytest.raises(UserError, match=r"metrics\.json: not the results of clpl_moe\.evaluate"):
        card(run=tmp_path, after=tmp_path / "after")
