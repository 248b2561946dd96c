import pytest

from clpl_moe.common.errors import OptionError
from clpl_moe.encoder.lengths import check_length, check_lengths, longest_input, max_positions
from helpers.tiny import make_encoder


def test_positions():
    assert max_positions(make_encoder(max_position_embeddings=130)) == 128  # two rows before the first position
    assert max_positions(make_encoder("bert")) == 40
    assert max_positions(make_encoder().encoder) is None


def test_lengths_beyond_the_positions_are_refused():
    model = make_encoder("bert")
    check_length(model, 40)
    with pytest.raises(OptionError, match="^max_length: found 41 tokens, the encoder takes 40 at most"):
        check_length(model, 41)
    check_lengths(model, 40, 40)
    with pytest.raises(OptionError, match="^query_max_len: found 41 tokens, some/model takes 40 at most"):
        check_lengths(model, 41, 40, "some/model")
    with pytest.raises(OptionError, match="^passage_max_len: "):
        check_lengths(model, 40, 41)
    with pytest.raises(ValueError, match="at least 1, found 0"):
        check_length(model, 0)


@pytest.mark.parametrize(
    ("limit", "stated", "expected"), [(30, None, 30), (30, 35, 35), (30, 50, 40), (10**30, None, 40), (10**30, 20, 20)]
)
def test_longest_input(tiny_tokenizer, monkeypatch, limit, stated, expected):
    monkeypatch.setattr(tiny_tokenizer, "model_max_length", limit)
    assert longest_input(make_encoder("bert"), tiny_tokenizer, stated) == expected
