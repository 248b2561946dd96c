import pytest

from clpl_moe.prepare.articles import make_collection
from clpl_moe.prepare.sources.squad import read_squad
from helpers.squad_files import article, many, squad


def test_split_depends_on_seed_and_content_not_on_order(tmp_path):
    articles = read_squad(squad(tmp_path / "a.json", *many(30)))

    def dev(articles, seed):
        return set(make_collection(articles, 0.2, seed).splits["dev"].queries.values())

    assert dev(articles, 1) == dev(articles[::-1], 1)
    assert dev(articles, 1) != dev(articles, 2)
    assert len(dev(articles, 1)) == len(dev(articles, 2)) == 18


@pytest.mark.parametrize(("share", "dev"), [(0.2, 2), (0.01, 1), (0.99, 9), (0.5, 5)])
def test_share(tmp_path, share, dev):
    articles = read_squad(squad(tmp_path / "a.json", *many(10)))
    assert make_collection(articles, share).counts["dev articles"] == dev


def test_skips_and_merges(tmp_path):
    file = squad(
        tmp_path / "a.json",
        article(
            "one",
            ("Same  text\u0065\u0301 here", "q1", " q1 ", {"question": "no", "is_impossible": True}),
            ("Same text\u00e9\nhere", "q2", {"question": "none", "answers": []}),
            ("  ", "lost"),
            ("without questions",),
            ("another", "q1", {"question": "  "}),
        ),
    )
    prepared = make_collection(read_squad(file), dev_share=0)
    assert [line["id"] for line in prepared.corpus] == ["0#0", "0#3", "0#4"]
    train = prepared.splits["train"]
    assert list(train.queries.values()) == ["q1", "q2"]
    first = next(iter(train.queries))
    assert [docid for qid, docid in train.judgements if qid == first] == ["0#0", "0#4"]
    assert prepared.positive_queries == {"0#0": ["q1", "q2"], "0#4": ["q1"]}
    expected = {
        "paragraphs": 5,
        "questions": 8,
        "passages": 3,
        "equal contexts merged": 1,
        "empty contexts skipped": 1,
        "questions on empty contexts skipped": 1,
        "impossible questions skipped": 2,
        "empty questions skipped": 1,
        "equal questions merged": 2,
    }
    assert {name: prepared.counts[name] for name in expected} == expected


def test_articles_that_share_a_context_or_a_title_stay_on_one_side(tmp_path):
    shared = ("공통 본문", "공통 질문?")
    made = many(8)
    for number in (0, 3, 6):
        made[number]["paragraphs"] += article(f"x{number}", shared)["paragraphs"]
    made[5]["title"] = made[1]["title"]
    articles = read_squad(squad(tmp_path / "a.json", *made))
    for seed in range(20):
        prepared = make_collection(articles, 0.4, seed)
        judged = {name: [docid for _, docid in split.judgements] for name, split in prepared.splits.items()}
        sides = {name: {docid.split("#")[0] for docid in docids} for name, docids in judged.items()}
        assert not sides["train"] & sides["dev"]
        for together in ({"0", "3", "6"}, {"1", "5"}):
            assert together <= sides["train"] or together <= sides["dev"]
        assert prepared.counts["dev articles"] == 3


def test_train_question_that_equals_a_dev_question_is_left_out(tmp_path):
    made = many(10)
    for number, one in enumerate(made):
        one["paragraphs"][0]["qas"].append({"id": f"same{number}", "question": "언제  태어났나?", "answers": [1]})
    prepared = make_collection(read_squad(squad(tmp_path / "a.json", *made)))
    assert prepared.counts["train questions that equal a dev question left out"] == 8
    texts = {name: set(split.queries.values()) for name, split in prepared.splits.items()}
    assert "언제  태어났나?" in texts["dev"]
    assert not texts["dev"] & texts["train"]
    assert not texts["dev"] & {q for queries in prepared.positive_queries.values() for q in queries}
