import pytest

from clpl_moe.common.files import read_jsonl, write_jsonl
from clpl_moe.synthesize.passages import Passage, SearchedPassages, passage_key
from helpers.synthesis import arguments, refused, train_file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"neg_q": [None]}, "out of"),
        ({"neg_ids": ["p1"]}, "train0.jsonl:1: field 'neg_ids': expected a list of strings, one for each passage"),
        ({"neg_ids": ["p1", "p1", "p2", "p3"]}, "train0.jsonl:1: field 'neg_ids': 'p1' had another text before"),
    ],
)
def test_faulty_lines_are_named(tmp_path, capfd, change, words):
    path = train_file(tmp_path, 4)
    ((_, record),) = read_jsonl(path)
    write_jsonl(path, [record | change])
    words = "field 'neg_q': found 1 entries, expected 4" if words == "out of" else words
    assert words in refused(capfd, arguments(None, path, tmp_path, base_url="http://127.0.0.1:9/v1"))


def test_passages_of_a_corpus_are_searched_after_the_own_ones_each_text_once():
    own = {passage_key(t): Passage(t) for t in ("다리", "강")}
    corpus = ["산", " 강 ", "들", "산", "길"]
    searched = SearchedPassages(own, corpus)
    assert len(searched) == 5
    assert list(searched) == ["다리", "강", "산", "들", "길"]
    assert searched[1:4] == ["강", "산", "들"]
    corpus[4] = "read when asked for"
    assert searched[-1] == corpus[4]
    assert list(SearchedPassages(own)) == ["다리", "강"]
