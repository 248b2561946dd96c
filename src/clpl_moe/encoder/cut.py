"""Very long texts are cut before the tokenizer reads them, where its first tokens stay the same.

A tokenizer reads a whole text before it truncates: seconds for a megabyte. Where it looks at each word by itself, the tokens up
to a white space are those of the whole text. Within a word without any, as in Chinese, the longest piece bounds how far a cut
can be seen: if all cuts within such a window have the same first tokens, so has the whole text. Other texts (a million times one
letter, BPE without white space) are read whole: a megabyte takes 1 to 3 seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

_CHARACTERS_A_TOKEN = 16  # with which the search begins
_WORTH_IT = 50_000  # characters: a shorter text is tokenised in a fraction of a second
_LONGEST_WINDOW = 128  # cuts


def cut_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[str]:
    """The texts, the very long ones shortened; the first ``max_length`` tokens of each are the same."""
    return [text if len(text) <= _WORTH_IT else _cut(tokenizer, text, max_length) for text in texts]


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # With room for special tokens only, nothing is truncated.
    if backend is None or tokenizer.truncation_side != "right" or max_length <= tokenizer.num_special_tokens_to_add():
        return text
    reader = _reader(backend, len(tokenizer))
    size = _CHARACTERS_A_TOKEN * max_length + 1_000
    while size < len(text) // 2:
        if reader.splits and (end := _last_word(text, size // 2, size)) is not None:
            if len(reader.tokens([text[:end]], max_length)[0]) == max_length:
                return text[:end]
        elif reader.window and size * reader.window < len(text):  # else the whole text is read sooner
            first, *others = reader.tokens([text[: size - place] for place in range(reader.window)], max_length)
            if len(first) == max_length and all(tokens == first for tokens in others):
                return text[:size]
        size *= 4
    return text


def _last_word(text: str, start: int, end: int) -> int | None:
    """The last place from ``start`` to ``end`` where a word ends at a white space; None where there is none."""
    places = (place for place in range(end, start, -1) if text[place] in " \n" and not text[place - 1].isspace())
    return next(places, None)


class _Reader:
    """A copy of a tokenizer, which threads share, that truncates nothing."""

    def __init__(self, backend: Any) -> None:
        self._copy = type(backend).from_str(backend.to_str())
        self._copy.no_truncation()
        self._copy.no_padding()
        splitter = self._copy.pre_tokenizer
        # Whether each word is looked at by itself.
        self.splits = splitter is not None and len(splitter.pre_tokenize_str("a b")) > 1
        # How many characters before a cut within a word can differ for it; 0: not known, as with merges (BPE).
        kind = json.loads(backend.to_str())["model"]["type"]
        longest = max(map(len, self._copy.get_vocab()))
        window = 3 * longest  # normalisation may join three characters, as of Hangul
        self.window = window if kind in ("Unigram", "WordPiece", "WordLevel") and window <= _LONGEST_WINDOW else 0

    def tokens(self, texts: list[str], most: int) -> list[list[int]]:
        """The first tokens of texts, without special ones."""
        return [found.ids[:most] for found in self._copy.encode_batch(texts, add_special_tokens=False)]


@lru_cache(maxsize=2)
def _reader(backend: Any, size: int) -> _Reader:
    del size  # of the vocabulary, to which tokens may be added
    return _Reader(backend)
