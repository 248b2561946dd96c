import numpy as np

from clpl_moe.mine.index import PassageIndex
from clpl_moe.retrieval.collection import Collection
from helpers.mining import PASSAGES, QRELS, make_collection


def load(folder, **options):
    return Collection.load(make_collection(folder, **options), "ko", "train")


def test_equal_passages_share_a_place_and_what_they_are_known_to_answer(tmp_path):
    passages = {**PASSAGES, "twin": "Apple, brick: 0!", "mark": "...", "last": "zebra"}
    index = PassageIndex(load(tmp_path, passages=passages), [("twin", ["of the twin"]), ("gone", ["nobody's"])])
    assert (len(index), index.repeated, index.reserved, index.unknown) == (17, 2, 0, 1)
    assert [index.passage_id(place) for place in range(len(index))] == [*PASSAGES, "last"]
    assert list(index.texts) == [*PASSAGES.values(), "zebra"]
    assert list(index.texts[2:4]) == [PASSAGES["p2"], PASSAGES["p3"]]
    assert index.negative_queries(0) == ["what about apple", "of the twin"]
    assert index.answering("of  the twin") == {0}
    assert index.find("APPLE brick 0") == 0
    assert index.find("zebra") == 16
    assert index.find("...") is None
    assert index.find("not there") is None
    assert index.relevant({"twin": 1, "p0": 1, "p3": 2, "p4": 0, "gone": 1}) == [0, 3]
    assert index.places({"p3", "last", "twin", "gone", "mark"}) == {"p3": 3, "last": 16, "twin": 0}


def test_no_text_is_kept_of_a_passage(tmp_path):
    """Of a corpus that is on disk, the index may hold numbers only."""
    collection = load(tmp_path)

    class Counted(list):
        asked = 0

        def __getitem__(self, row):
            Counted.asked += 1
            return super().__getitem__(row)

    collection.passages = Counted(collection.passages)
    index = PassageIndex(collection)
    assert index.texts[5] == PASSAGES["p5"]
    assert index.texts[5] == PASSAGES["p5"]
    assert Counted.asked == 2
    assert index.rows.dtype == np.int64
    answering = {index.find(PASSAGES[p]) for judged in QRELS.values() for p, r in judged.items() if r}
    assert {place for place in range(len(index)) if index.negative_queries(place)} == answering


def test_passages_of_another_split_have_no_place(tmp_path):
    index = PassageIndex(load(tmp_path, splits={"p0": "dev", "p1": "train"}))
    assert index.reserved == 1
    assert index.find(PASSAGES["p0"]) is None
    assert index.passage_id(0) == "p1"
