import pytest
import torch

from clpl_moe.common.text_key import text_id
from clpl_moe.data.collator import CLPLCollator
from clpl_moe.data.dataset import Example


def make(tokenizer, **options):
    options = {"query_max_len": 8, "passage_max_len": 12, "padding": True, "return_tensors": "pt"} | options
    return CLPLCollator(tokenizer=tokenizer, **options)


def example(query="ab", passages=("c", "d", "e"), negative_queries=((), ()), scores=None, in_batch=True):
    return Example(query, list(passages), [list(q) for q in negative_queries], scores, in_batch)


EXAMPLES = [
    example("q", ["p", "n", "m"], [["a"], []]),
    example("r", ["o", "x", "p"], [[], ["bb", "c"]]),
    example("s", ["t"], []),
]


def texts(tokenizer, features):
    rows = features["input_ids"]
    return [tokenizer.decode(row, skip_special_tokens=True).replace(" ", "") for row in rows]


def test_queries_of_negatives_point_at_their_passages(tiny_tokenizer):
    """Also with ragged groups: 3, 3 and 1 passages."""
    batch = make(tiny_tokenizer)(EXAMPLES)
    assert texts(tiny_tokenizer, batch["queries"]) == ["q", "r", "s"]
    assert texts(tiny_tokenizer, batch["passages"]) == ["p", "n", "m", "o", "x", "p", "t"]
    assert texts(tiny_tokenizer, batch["negative_queries"]) == ["a", "bb", "c"]
    assert batch["negative_index"].tolist() == [1, 5, 5]
    assert batch["negative_index"].dtype == torch.int64
    assert batch["no_in_batch_neg_flag"] is False
    assert batch["teacher_scores"] is None


def test_queries_of_negatives_are_cut_as_queries(tiny_tokenizer):
    """The 2024 code cut them at the passages' length."""
    long = "abcdefghij" * 3
    batch = make(tiny_tokenizer)([example(long, [long, long], [[long]])])
    widths = [batch[name]["input_ids"].shape[1] for name in ("queries", "negative_queries", "passages")]
    assert widths == [8, 8, 12]


def test_without_queries_of_negatives(tiny_tokenizer):
    batch = make(tiny_tokenizer)([example(), example()])
    assert batch["negative_queries"] is None
    assert batch["negative_index"] is None


def test_text_ids(tiny_tokenizer):
    ids = make(tiny_tokenizer)(EXAMPLES)["passage_ids"]
    assert ids.dtype == torch.int64
    assert ids[0] == ids[5]
    assert len(set(ids.tolist())) == 6
    examples = [example("q", negative_queries=[["a"], ["b"]]), example("a", negative_queries=[["q"], []])]
    queries = make(tiny_tokenizer)(examples)["query_ids"].tolist()
    assert queries == [text_id(text) for text in ("q", "a", "a", "b", "q")]


def test_teacher_scores_and_own_negatives(tiny_tokenizer):
    batch = make(tiny_tokenizer)([example(scores=[1.0, 0.5, 0.2]), example(scores=[0.9, 0.1, 0.0], in_batch=False)])
    assert batch["teacher_scores"] == [1.0, 0.5, 0.2, 0.9, 0.1, 0.0]
    assert batch["no_in_batch_neg_flag"] is True


@pytest.mark.parametrize("size", [1, 2, 50])
def test_sub_batches_hold_the_same_rows(tiny_tokenizer, size):
    whole, parts = make(tiny_tokenizer)(EXAMPLES), make(tiny_tokenizer, sub_batch_size=size)(EXAMPLES)
    for name in ("queries", "passages", "negative_queries"):
        assert all(len(part["input_ids"]) <= size for part in parts[name])
        rows = [text for part in parts[name] for text in texts(tiny_tokenizer, part)]
        assert rows == texts(tiny_tokenizer, whole[name])
    assert parts["negative_index"].tolist() == [1, 5, 5]


def test_padding(tiny_tokenizer):
    batch = make(tiny_tokenizer, pad_to_multiple_of=8)(EXAMPLES)
    assert batch["passages"]["input_ids"].shape[1] == 8
    assert batch["passages"]["attention_mask"].sum(1).tolist() == [3] * 7


class TestPacked:
    def decode(self, tokenizer, batch, rows):
        texts = batch["texts"].select(rows)
        return [tokenizer.decode(ids).replace(" ", "") for ids in texts.input_ids.split(texts.lengths.tolist())]

    def test_holds_the_padded_batchs_texts(self, tiny_tokenizer):
        padded, packed = make(tiny_tokenizer)(EXAMPLES), make(tiny_tokenizer, packing=True)(EXAMPLES)
        for name, rows in (
            ("queries", "query_rows"),
            ("passages", "passage_rows"),
            ("negative_queries", "negative_query_rows"),
        ):
            expected = [f"<s>{text}</s>" for text in texts(tiny_tokenizer, padded[name])]
            assert self.decode(tiny_tokenizer, packed, packed[rows]) == expected
        for name in ("negative_index", "passage_ids", "query_ids"):
            assert packed[name].equal(padded[name])
        for name in ("teacher_scores", "no_in_batch_neg_flag"):
            assert packed[name] == padded[name]

    def test_equal_texts_are_there_once(self, tiny_tokenizer):
        """Among queries, passages and the queries of negatives; also those that only truncation makes equal."""
        same = example("ab", ["ab", "c", "abcdefghijkl"], [["c"], ["abcdefghijxx", "ab"]])
        batch = make(tiny_tokenizer, packing=True, passage_max_len=8)([same, example("x", ["abcdefghijyy"], [])])
        assert sorted(batch["texts"].lengths.tolist()) == [3, 3, 4, 8]
        assert len(batch["passage_rows"]) == 4
        assert batch["passage_rows"][2] == batch["passage_rows"][3] == batch["negative_query_rows"][1]
        assert batch["query_rows"][0] == batch["passage_rows"][0] == batch["negative_query_rows"][2]

    def test_equal_lengths_are_neighbours(self, tiny_tokenizer):
        lengths = make(tiny_tokenizer, packing=True)(EXAMPLES)["texts"].lengths
        assert lengths.equal(lengths.sort().values)

    def test_without_queries_of_negatives(self, tiny_tokenizer):
        batch = make(tiny_tokenizer, packing=True)([example(), example()])
        assert batch["negative_query_rows"] is None
        assert len(batch["texts"]) == 4
