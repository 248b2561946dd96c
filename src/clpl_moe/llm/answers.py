"""From what a language model wrote to queries: cleaned, and checked against what models do wrong."""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from collections import Counter
from typing import Any

from clpl_moe.data.scripts import script_of
from clpl_moe.retrieval.collection import normalize_text

# Of a language's letters. Of other languages: the script of the passage itself.
_SCRIPTS = {
    **{"ko": {"Hangul"}, "ja": {"Hiragana", "Katakana", "Han"}, "zh": {"Han"}, "ru": {"Cyrillic"}},
    **{"fa": {"Arabic"}, "ar": {"Arabic"}, "ur": {"Arabic"}, "hi": {"Devanagari"}, "mr": {"Devanagari"}},
    **{"bn": {"Bengali"}, "te": {"Telugu"}, "th": {"Thai"}},
}
# Names and abbreviations in Latin letters are common in queries of every language.
_LEAST_SHARE = 0.3
_WITHOUT_SPACES = {"ja", "zh", "th", "lo", "km", "my"}

# The opening tag may stand in the prompt, put there by the model's chat template; the closing one is missing where the
# answer was cut off.
_REASONING = re.compile(r"\A.*</think(?:ing)?>|<think(?:ing)?>.*", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"^[^\S\n]*```\w*[^\S\n]*$|```(?:json)?", re.MULTILINE | re.IGNORECASE)
# The beginning of what is JSON, or was meant to be; without a limit, brackets without end would be looked at from each line on.
_JSON = re.compile(r"^[^\S\n]*([\[{][\[{\s]{0,500}[\"'])", re.MULTILINE)
_QUERY_FIELDS = ("query", "question", "text")
_QUESTION_MARKS = ("?", "؟", "？")
_MARKER = re.compile(r"^(?:[-*•·‣–—>#]+\s+|[(\[]?\d{1,2}[.)\]]+\s+)")
_LABEL = re.compile(
    r"^(?:(?:search\s+)?quer(?:y|ies)|questions?|q|검색\s*질문|질문|질의|검색어|پرسش|سؤال|سوال|प्रश्न|सवाल|खोज-प्रश्न)"
    r"\s*\d{0,2}\s*[:：]\s*",
    re.IGNORECASE,
)
_QUOTES = {pair[0]: pair[1] for pair in ('""', "''", "“”", "‘’", "«»", "「」", "『』", "„“", "``", "**", "__")}


def clean(text: str) -> list[str]:
    """The candidates in an answer, one for each line or, where it holds JSON, for each query of that, without what is put
    around queries.

    Taken away: a model's written reasoning, code fences, headings that end in a colon, list markers and numbers, labels
    such as ``Query:``, emphasis, quotation marks. JSON that gives no query is one candidate as it is.
    """
    text = without_reasoning(text)
    lines = _json_queries(text)
    if not lines:
        unreadable = _JSON.search(text)
        lines = [text[unreadable.start() :]] if unreadable else text.splitlines()
    candidates = (_strip(line) for line in lines)
    return [candidate for candidate in candidates if candidate and not candidate.endswith((":", "："))]


def without_reasoning(text: str) -> str:
    """An answer without the reasoning that a model writes before it, and without code fences."""
    return _FENCE.sub("\n", _REASONING.sub("", text))


def _json_queries(text: str) -> list[str]:
    """The queries of the JSON values that begin a line; what stands before and after them is left out."""
    decoder = json.JSONDecoder()
    queries: list[str] = []
    place = 0
    while start := _JSON.search(text, place):
        place = start.end()
        with contextlib.suppress(ValueError, RecursionError):
            value, place = decoder.raw_decode(text, start.start(1))
            queries += _queries_of(value)
    return queries


def _queries_of(value: list[Any] | dict[str, Any]) -> list[str]:
    """Of a list the query of each entry; of an object the field whose name says that it holds queries, else the first list
    in it, else all its strings."""
    entries: Any = value
    if isinstance(value, dict):
        named = [value[name] for name in ("queries", "questions", *_QUERY_FIELDS) if name in value]
        named = [v for v in named if isinstance(v, (str, list))]
        lists = [v for v in value.values() if isinstance(v, list)]
        entries = next(iter(named + lists), list(value.values()))
    return [query for entry in ([entries] if isinstance(entries, str) else entries) if (query := _query_of(entry))]


def _query_of(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return entry if isinstance(entry, str) else None
    strings = {name: v for name, v in entry.items() if isinstance(v, str)}
    # Where no name says it: fields besides the query are short, such as its type.
    longest = max(strings.values(), key=len, default=None)
    return next((strings[name] for name in _QUERY_FIELDS if name in strings), longest)


def _strip(line: str) -> str:
    line = normalize_text(line.replace("**", "").replace("__", ""))
    while True:
        before = line
        line = _LABEL.sub("", _MARKER.sub("", line)).strip()
        if len(line) > 1 and _QUOTES.get(line[0]) == line[-1] and not _two_quoted(line):
            line = line[1:-1].strip()
        if line == before:
            return line


def _two_quoted(line: str) -> bool:
    """Whether the quotation marks at both ends are not each other's: «a» and «b»."""
    return 0 <= line.find(line[-1], 1, -1) < line.rfind(line[0], 1, -1)


def find_fault(query: str, passage: str, language: str, max_chars: int) -> str | None:
    """In a few words, why a cleaned query cannot be used; None where it can.

    At least three of ten letters have to be of the language's script.
    """
    letters = _scripts(query)
    if letters.total() < 2:
        return "empty"
    if _JSON.match(query):
        return "unreadable JSON"
    if len(query) > max_chars:
        return "too long"
    language = language.split("-")[0]
    expected = _SCRIPTS.get(language) or {script for script, _ in _scripts(passage).most_common(1)}
    if expected and sum(letters[script] for script in expected) < _LEAST_SHARE * letters.total():
        return "wrong script"
    # From a word's beginning, or "art" would be copied from "party"; to anywhere, since Korean particles may follow.
    before = "" if language in _WITHOUT_SPACES else " "
    if before + _words(query) in before + _words(passage):
        return "copied from the passage"
    return None


def read_queries(
    text: str | None, passage: str, *, language: str, wanted: int, max_chars: int, cut: bool = False
) -> tuple[list[str], str | None]:
    """The first ``wanted`` usable queries of an answer, each once; where there is none, why not.

    Of more than ``wanted``, those that end in a question mark come first: others may be what a model says besides.
    The last line of an answer that was ``cut`` at its limit of tokens is not whole.
    """
    candidates = clean(text or "")
    if cut and candidates:
        candidates.pop()
        if not candidates:
            return [], "cut off"
    found = {candidate: find_fault(candidate, passage, language, max_chars) for candidate in candidates}
    queries = [candidate for candidate, fault in found.items() if fault is None]
    if queries:
        if len(queries) > wanted:
            queries.sort(key=lambda query: not query.endswith(_QUESTION_MARKS))
        return queries[:wanted], None
    # What a model writes besides a bad query ("Sure!") says less than the query.
    return [], next((fault for fault in reversed(found.values()) if fault != "empty"), "empty")


def _scripts(text: str) -> Counter[str]:
    return Counter(filter(None, map(script_of, text)))


def _words(text: str) -> str:
    """Text without case, punctuation and the like, to compare."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Letters, numbers, and marks such as the vowel signs of Hindi, which "\w" does not match.
    table = {ord(c): c if unicodedata.category(c)[0] in "LNM" else " " for c in set(folded)}
    return " ".join(folded.translate(table).split())
