import pytest
import torch

from clpl_moe.data.collator import CLPLCollator, text_id
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
    # The same in every process and run, unlike Python's own hash.
    assert text_id("한국어") == 5647945873834442492
    assert all(0 <= text_id(str(i)) < 2**63 for i in range(100))


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
