"""Texts of any script for a page: cut without tearing characters, direction, signs."""

from __future__ import annotations

import unicodedata


def cut(text: str, length: int) -> tuple[str, bool]:
    """The beginning of a text and whether something was cut off: at a space where there is one near, else where no
    character is torn from the marks that belong to it."""
    if len(text) <= length:
        return text, False
    end = text.rfind(" ", length // 2, length + 1)
    if end < 0:
        end = length
        # Vowel signs, the virama and joiners belong to the letter before; a letter after a joiner or virama does as well.
        while end < len(text) and (
            unicodedata.category(text[end]) in ("Mn", "Mc", "Me", "Cf")
            or text[end - 1] == "\u200d"  # joiner
            or unicodedata.combining(text[end - 1]) == 9  # virama
        ):
            end += 1
    return text[:end].rstrip() + " …", True


def is_right_to_left(text: str) -> bool:
    """Whether most letters are of a script written from right to left; the first one may well be a foreign name's."""
    directions = [unicodedata.bidirectional(character) for character in text]
    return sum(d in ("R", "AL") for d in directions) > sum(d == "L" for d in directions)


def signed(value: float, digits: int) -> str:
    """A difference, with its sign unless it rounds to 0."""
    if round(value, digits) == 0:
        return f"{0:.{digits}f}"
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(share: float | None) -> str:
    """A relative change in per cent, with its sign; a dash for None."""
    return "–" if share is None else f"{100 * share:+.1f}%".replace("-", "−")
