"""The scripts that texts are written in."""

from __future__ import annotations

import unicodedata


def script_of(character: str) -> str | None:
    """The script of a letter, the first word of its Unicode name (Hangul, Arabic, ...); None where it is no letter.

    >>> script_of("한"), script_of("म"), script_of("é"), script_of("漢"), script_of("7")
    ('Hangul', 'Devanagari', 'Latin', 'Han', None)
    """
    if not unicodedata.category(character).startswith("L"):
        return None
    words = unicodedata.name(character, "Other").split()
    while words[0] in ("HALFWIDTH", "FULLWIDTH", "MODIFIER", "SUPERSCRIPT", "SUBSCRIPT") and len(words) > 1:
        words = words[1:]
    return {"CJK": "Han", "IDEOGRAPHIC": "Han", "LETTER": "Other", "MATHEMATICAL": "Other"}.get(
        words[0], words[0].capitalize()
    )
