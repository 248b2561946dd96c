import errno
import json
import re

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.data.dataset import CLPLTrainDataset, Negative
from clpl_moe.train.arguments import CLPLDataArguments
from helpers.tiny_training import make_triplets, write_triplets


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_triplets(tmp_path_factory.mktemp("data") / "train.jsonl", 12)


def make(path, cache, seed=0, leave_out_answers=True, **options):
    paths = [str(p) for p in path] if isinstance(path, list) else [str(path)]
    args = CLPLDataArguments(train_data=paths, cache_path=str(cache), **{"train_group_size": 4} | options)
    return CLPLTrainDataset(args, seed=seed, leave_out_answers=leave_out_answers)


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def test_groups_hold_a_positive_then_negatives_with_their_queries(path, tmp_path):
    dataset = make(path, tmp_path, queries_per_negative=2)
    assert len(dataset) == 12
    for index, record in enumerate(make_triplets(12)):
        example = dataset[(0, index)]
        assert example.query == record["query"]
        assert example.passages[0] in record["pos"]
        assert len(example.passages) == 4
        assert len(set(example.passages[1:])) == 3
        for text, queries in zip(example.passages[1:], example.negative_queries):
            known = record["neg_q"][record["neg"].index(text)] or []
            assert sorted(queries) == sorted([known] if isinstance(known, str) else known)
        assert example.teacher_scores is None
        assert example.in_batch_negatives


def test_draws_depend_on_seed_epoch_and_index_only(path, tmp_path):
    """Not on what was drawn before: FlagEmbedding draws from the global generator, and differently after a resume."""
    dataset = make(path, tmp_path)
    draws = {(e, i): dataset[(e, i)] for e in (0, 1) for i in range(12)}
    again = make(path, tmp_path)
    for draw in reversed(list(draws)):
        assert again[draw] == draws[draw]
    assert any(draws[0, i] != draws[1, i] for i in range(12))
    other = make(path, tmp_path, seed=1)
    assert any(other[0, i] != draws[0, i] for i in range(12))


def test_few_negatives_are_repeated_evenly(path, tmp_path):
    """Where answers are not left out, as in FlagEmbedding."""
    passages = make(path, tmp_path, train_group_size=11, leave_out_answers=False)[(0, 0)].passages[1:]
    assert sorted(passages.count(text) for text in set(passages)) == [2, 2, 3, 3]


def test_queries_per_negative(path, tmp_path):
    counts = {
        limit: sum(
            len(queries)
            for i in range(12)
            for queries in make(path, tmp_path, queries_per_negative=limit)[(0, i)].negative_queries
        )
        for limit in (0, 1, 2)
    }
    assert counts[0] == 0 < counts[1] < counts[2]


def test_own_query_is_no_query_of_a_negative(tmp_path):
    record = {"query": "q", "pos": ["p"], "neg": ["n", "m"], "neg_q": [["q", "other"], "q"]}
    path = write(tmp_path / "t.jsonl", [record])
    options = {"train_group_size": 3, "queries_per_negative": 5}
    dataset = make(path, tmp_path, **options, leave_out_answers=False)
    assert sorted(dataset[(0, 0)].negative_queries) == [[], ["other"]]
    # These negatives are known to answer it.
    assert make(path, tmp_path, **options)[(0, 0)].ids.passages[1:] == [-1, -1]


@pytest.mark.parametrize("same_dataset", [False, True])
def test_without_a_prompt_texts_stay_as_they_are(tmp_path, same_dataset):
    """FlagEmbedding makes each query "None<query>" in same-dataset batches."""
    path = write_triplets(tmp_path / "t.jsonl", 4, type="symmetric_sts")
    dataset = make(path, tmp_path, same_dataset_within_batch=same_dataset, small_threshold=0)
    for index, record in enumerate(make_triplets(4)):
        example = dataset[(0, index)]
        assert example.query == record["query"]
        assert not [
            t for t in [*example.passages, *(q for queries in example.negative_queries for q in queries)] if "None" in t
        ]


def test_prompts(tmp_path):
    records = [
        {"query": "q", "pos": ["p"], "neg": ["n"], "neg_q": ["a"]},
        {"query": "q", "pos": ["p"], "neg": ["n"], "neg_q": ["a"], "prompt": "own"},
    ]
    dataset = make(
        write(tmp_path / "t.jsonl", records),
        tmp_path,
        train_group_size=2,
        query_instruction_for_retrieval="find",
        query_instruction_format="<{}>\\n{}",
        passage_instruction_for_retrieval="text: ",
    )
    for index, prompt in enumerate(("find", "own")):
        example = dataset[(0, index)]
        assert example.query == f"<{prompt}>\nq"
        assert example.passages == ["text: p", "text: n"]
        assert example.negative_queries == [[f"<{prompt}>\na"]]


def test_symmetric_data_has_queries_on_both_sides(tmp_path):
    path = write_triplets(tmp_path / "t.jsonl", 1, type="symmetric_sts")
    dataset = make(path, tmp_path, query_instruction_for_retrieval="q: ", passage_instruction_for_retrieval="p: ")
    assert all(text.startswith("q: ") for text in dataset[(0, 0)].passages)


def test_teacher_scores_follow_their_passages(tmp_path):
    record = {
        "query": "q",
        "pos": ["p", "o"],
        "neg": list("abcd"),
        "pos_scores": [9, 8],
        "neg_scores": [1, 2, 3, 4],
    }
    known = dict(zip(record["pos"] + record["neg"], [9, 8, 1, 2, 3, 4]))
    path = write(tmp_path / "t.jsonl", [record] * 8)
    dataset = make(path, tmp_path, knowledge_distillation=True)
    for index in range(8):
        example = dataset[(0, index)]
        assert example.teacher_scores == [known[text] for text in example.passages]
    assert make(path, tmp_path)[(0, 0)].teacher_scores is None


def test_files_with_and_without_optional_fields_go_together(tmp_path):
    """And a changed file is read anew."""
    a = write(tmp_path / "a.jsonl", [{"query": "q", "pos": ["p"], "neg": ["n"]}])
    b = write(tmp_path / "b", [{"query": "r", "pos": ["p"], "neg": ["n"], "neg_q": [["a", "b"]], "id": 3}])
    dataset = make([a, b], tmp_path)
    assert [dataset[(0, i)].query for i in range(2)] == ["q", "r"]
    assert dataset[(0, 0)].negative_queries == [[], [], []]
    write(a, [{"query": "new", "pos": ["p"], "neg": ["n"]}])
    assert make(a, tmp_path)[(0, 0)].query == "new"


def test_train_data_as_a_string_is_one_path(path, tmp_path):
    """FlagEmbedding iterates over its characters."""
    args = CLPLDataArguments(train_data=str(path), cache_path=str(tmp_path))
    assert args.train_data == [str(path)]
    assert len(CLPLTrainDataset(args)) == 12


def test_fault_names_the_path_as_it_was_given(tmp_path, monkeypatch):
    write(
        tmp_path / "t.jsonl",
        [{"query": "q", "pos": ["p"], "neg": ["n"]}, {"query": "q", "pos": [], "neg": ["n"]}],
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^t\.jsonl:2: field 'pos'"):
        make("t.jsonl", tmp_path)


def test_max_example_num_takes_the_same_ones_each_time(path, tmp_path):
    queries = [[e.query for e in (d[(0, i)] for i in range(5))] for d in (
        make(path, tmp_path, max_example_num_per_dataset=5), make(path, tmp_path, max_example_num_per_dataset=5)
    )]  # fmt: skip
    assert queries[0] == queries[1]
    assert len(set(queries[0])) == 5
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(path.read_bytes())
    dataset = make(moved, tmp_path, max_example_num_per_dataset=5)
    assert [dataset[(0, i)].query for i in range(5)] == queries[0]


def test_shuffled_words_stay_the_positives_characters(tmp_path):
    text = " ".join(f"word{i}" for i in range(40))
    path = write(tmp_path / "t.jsonl", [{"query": "q", "pos": [text], "neg": ["n"]}] * 6)
    positives = [make(path, tmp_path, shuffle_ratio=1.0)[(0, i)].passages[0] for i in range(6)]
    assert all(sorted(re.sub(r"\s", "", p)) == sorted(re.sub(r"\s", "", text)) for p in positives)
    assert set(positives) != {text}
    assert make(path, tmp_path)[(0, 0)].passages[0] == text


def test_small_files_of_a_folder_are_joined_or_dropped(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, size in (("big", 9), ("small", 3), ("tiny", 2)):
        write_triplets(folder / f"{name}.jsonl", size)
    same = {"same_dataset_within_batch": True}
    assert make(folder, tmp_path, small_threshold=4, drop_threshold=5, **same).part_sizes == [9, 5]
    assert make(folder, tmp_path, small_threshold=4, drop_threshold=6, **same).part_sizes == [9]
    assert sorted(make(folder, tmp_path).part_sizes) == [2, 3, 9]
    with pytest.raises(UserError, match="small_threshold is 99"):
        make(folder, tmp_path, small_threshold=99, drop_threshold=99, **same)


def test_own_negatives_and_group_size_by_name_and_type(tmp_path):
    own = write_triplets(tmp_path / "x_no_in_batch_neg.jsonl", 3, type="only_1neg")
    other = write_triplets(tmp_path / "y.jsonl", 3)
    dataset = make([own, other], tmp_path, small_threshold=0, same_dataset_within_batch=True)
    assert [dataset[(0, i)].in_batch_negatives for i in (0, 3)] == [False, True]
    assert [len(dataset[(0, i)].passages) for i in (0, 3)] == [2, 4]


def test_group_of_the_positive_alone(path, tmp_path):
    example = make(path, tmp_path, train_group_size=1)[(0, 0)]
    assert (len(example.passages), example.negative_queries) == (1, [])


def test_a_cache_that_cannot_be_used_is_told(path, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file/examples: cannot be written, .*file is not a folder"):
        make(path, tmp_path / "file")

    class Full:
        def __init__(self, *args, **kwargs):
            pass

        def write(self, *args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        write_table = write_row = finalize = write

        def close(self):
            pass

    monkeypatch.setattr("datasets.builder.ArrowWriter", Full)
    with pytest.raises(
        UserError, match=r"cache: the examples cannot be stored \(No space left on device\); name another"
    ):
        make(path, tmp_path / "cache")
    assert (tmp_path / "file").read_text() == "mine"


def pairs(count, start=0):
    return [{"query": f"q{i}", "pos": [f"p{i}", f"r{i}"]} for i in range(start, start + count)]


@pytest.mark.parametrize("same_dataset", [False, True])
def test_pairs_alone_are_groups_of_the_positive(tmp_path, same_dataset):
    path = write(tmp_path / "t.jsonl", pairs(6))
    dataset = make(path, tmp_path, same_dataset_within_batch=same_dataset, small_threshold=0)
    assert dataset.group_size(0) == 1
    assert [dataset[(0, i)].passages[0][0] in "pr" and len(dataset[(0, i)].passages) for i in range(6)] == [1] * 6


def test_pairs_beside_triplets_take_positives_of_other_queries(tmp_path):
    """A group of a batch has as many passages as the others."""
    records = [*pairs(6), {"query": "q0", "pos": ["s0"], "neg": ["n"] * 3}, *pairs(1)]
    dataset = make(write(tmp_path / "t.jsonl", records), tmp_path)
    assert dataset.pairs == [7]
    drawn = {(epoch, index): dataset[(epoch, index)] for epoch in range(9) for index in range(8)}
    for (_, index), example in drawn.items():
        assert len(example.passages) == 4
        assert len(example.negative_queries) == 3
        if index != 6:
            others = {p for r in records if r["query"] != example.query for p in r["pos"]}
            assert set(example.passages[1:]) <= others
            assert len(set(example.passages)) == 4
    assert len({tuple(drawn[epoch, 1].passages[1:]) for epoch in range(9)}) > 1
    again = make(tmp_path / "t.jsonl", tmp_path)
    assert all(again[draw] == example for draw, example in reversed(drawn.items()))


def test_a_part_of_pairs_has_groups_of_its_own_size(tmp_path):
    paths = [write(tmp_path / "a.jsonl", pairs(3)), write_triplets(tmp_path / "b.jsonl", 3)]
    dataset = make(paths, tmp_path, same_dataset_within_batch=True, small_threshold=0)
    assert [len(dataset[(0, i)].passages) for i in range(6)] == [1] * 3 + [4] * 3


def test_a_pair_with_no_other_query_has_its_positive_for_a_negative(tmp_path):
    """Equal texts are left out of the loss."""
    records = [pairs(1)[0] | {"pos": ["p0"]}, pairs(1)[0] | {"neg": ["n", "m", "o"]}]
    dataset = make(write(tmp_path / "t.jsonl", records), tmp_path)
    assert dataset[(0, 0)].passages == ["p0"] * 4


def test_mined_negatives_make_groups_of_pairs(tmp_path):
    class Mined:
        def get(self, example):
            return [Negative(text, number, [], []) for number, text in enumerate("abc")] if example else None

        def answers(self, query):
            return ()

    dataset = make(write(tmp_path / "t.jsonl", pairs(5)), tmp_path)
    dataset.mined = Mined()
    assert sorted(dataset[(0, 1)].passages[1:]) == ["a", "b", "c"]
    assert len(set(dataset[(0, 0)].passages)) == 4
