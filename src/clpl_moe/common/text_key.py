"""The key by which two texts count as the same text; one set of rules serves all scripts.

Two texts are the same where a reader would call one a copy of the other. The key folds

1. Unicode forms, by NFKC: compatibility characters (full-width letters, ligatures), and letters of one code point or of
   several (Korean syllables and their jamo, letters with the nukta of Devanagari);
2. characters that nobody sees: zero-width ones, joiners, soft hyphens, variation selectors; the tatweel of Arabic;
3. the digits of all scripts, to 0 to 9;
4. in Arabic script: ye and kaf of Arabic and Persian, vowel marks, the hamza over a last he. White space beside a letter of
   it does not count, since Persian writes the parts of a word apart, joined, or with a zero-width non-joiner between them;
5. other white space (a line break, several spaces) and punctuation, to one space;
6. case.

All else stays: vowel signs, anusvara and nukta of Devanagari, accents, hamza and madda over alef, symbols (``C++``, ``C#``,
``5%``), spaces between words and between digits (``1 2`` is not ``12``).

Case and punctuation go, since the key decides which texts are no negatives. Where it takes two texts for one by mistake, a
query has one negative less. Where it misses a copy, the loss pushes an answer away as long as training goes on.
"""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from functools import cache

_KEPT = "#%&@"  # punctuation by category, but a part of names and numbers
_ARABIC = "[\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff]"
_HAS_ARABIC = re.compile(_ARABIC)
_SPACE_BESIDE_ARABIC = re.compile(f"(?<={_ARABIC}) | (?={_ARABIC})")
_HE_WITH_HAMZA = re.compile("\u06c0|\u0647\u0654+")
_LETTERS = {"\u064a": "\u06cc", "\u0649": "\u06cc", "\u0643": "\u06a9", "\u06c0": "\u0647", "\u066a": "%"}
_MADDA_AND_HAMZA = range(0x0653, 0x0656)
# Invisible, though letters or marks by category: the tatweel, a grapheme joiner, fillers of Hangul, variation selectors.
_INVISIBLE = {0x0640, 0x034F, 0x115F, 0x1160, *range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}


def text_key(text: str) -> str:
    """The key of a text: equal keys, the same text; empty where it has no letter, digit or symbol. A key is its own key."""
    if text.isascii():
        return " ".join(text.lower().translate(_table()).split())
    text = unicodedata.normalize("NFKC", text).casefold().translate(_table())
    text = " ".join(text.split())
    if arabic := _HAS_ARABIC.search(text):
        text = _SPACE_BESIDE_ARABIC.sub("", text)
    text = unicodedata.normalize("NFKC", text)  # what is gone now may have stood between the parts of a letter
    if arabic:  # he, ye, each with a hamza
        text = _HE_WITH_HAMZA.sub("\u0647", text).replace("\u06cc\u0654", "\u0626")
    return text


def text_id(text: str) -> int:
    """A number below 2⁶³ that stands for a text's key, the same in every process and run.

    Of a million texts, two different ones share a number with a probability below one in ten million.
    """
    key = text_key(text).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


@cache
def _table() -> dict[int, str | None]:
    """What becomes of single characters."""
    table: dict[int, str | None] = {}
    for code in range(sys.maxunicode + 1):
        kind = unicodedata.category(character := chr(code))
        mark = kind == "Mn" and 0x0610 <= code <= 0x06ED and code not in _MADDA_AND_HAMZA
        if kind == "Cf" or mark or code in _INVISIBLE:
            table[code] = None
        elif (kind[0] == "P" and character not in _KEPT) or kind == "Cc":
            table[code] = " "
        elif kind == "Nd" and not character.isascii():
            table[code] = str(unicodedata.digit(character))
    return table | {ord(letter): folded for letter, folded in _LETTERS.items()}
