"""From what a language model wrote to queries: cleaned, and checked against what models do wrong."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter

from clpl_moe.data.scripts import script_of
from clpl_moe.retrieval.collection import normalize_text

# Of a language's letters. Of other languages: the script of the passage itself.
_SCRIPTS = {
    "ko": {"Hangul"},
    "fa": {"Arabic"},
    "ar": {"Arabic"},
    "ur": {"Arabic"},
    "hi": {"Devanagari"},
    "mr": {"Devanagari"},
    "ja": {"Hiragana", "Katakana", "Han"},
    "zh": {"Han"},
    "bn": {"Bengali"},
    "te": {"Telugu"},
    "th": {"Thai"},
    "ru": {"Cyrillic"},
}
# Names and abbreviations in Latin letters are common in queries of every language.
_LEAST_SHARE = 0.3

_REASONING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_MARKER = re.compile(r"^(?:[-*•·‣–—>#]+\s+|[(\[]?\d{1,2}[.)\]]+\s+)")
_LABEL = re.compile(
    r"^(?:(?:search\s+)?quer(?:y|ies)|questions?|q|검색\s*질문|질문|질의|검색어|پرسش|سؤال|سوال|प्रश्न|सवाल|खोज-प्रश्न)"
    r"\s*\d{0,2}\s*[:：]\s*",
    re.IGNORECASE,
)
_QUOTES = {
    '"': '"',
    "'": "'",
    "“": "”",
    "‘": "’",
    "«": "»",
    "「": "」",
    "『": "』",
    "„": "“",
    "`": "`",
    "*": "*",
    "_": "_",
}


def clean(text: str) -> list[str]:
    """The candidates in an answer, one for each line or entry of a JSON list, without what is put around queries.

    Taken away: a model's written reasoning, code fences, headings that end in a colon, list markers and numbers, labels
    such as ``Query:``, emphasis, quotation marks.
    """
    text = _REASONING.sub("", text)
    lines = [line for line in text.splitlines() if not line.strip().startswith("```")]
    lines = _json_strings("\n".join(lines)) or lines
    candidates = (_strip(line) for line in lines)
    return [candidate for candidate in candidates if candidate and not candidate.endswith((":", "："))]


def _json_strings(text: str) -> list[str]:
    """The strings of a JSON list (first values of its objects), also of one that is the value of an object; none where
    the text is something else."""
    if not text.strip().startswith(("[", "{")):
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if isinstance(value, dict):
        value = next((v for v in value.values() if isinstance(v, list)), list(value.values()))
    entries = (next(iter(v.values()), None) if isinstance(v, dict) else v for v in value)
    return [v for v in entries if isinstance(v, str)]


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
    """In a few words, why a query cannot be used; None where it can.

    Args:
        query: cleaned.
        passage: the text that it was written for.
        language: decides which letters are expected: at least three of ten in the language's script.
        max_chars: longest query.
    """
    letters = _scripts(query)
    if letters.total() < 2:
        return "empty"
    if len(query) > max_chars:
        return "too long"
    expected = _SCRIPTS.get(language.split("-")[0]) or {script for script, _ in _scripts(passage).most_common(1)}
    if expected and sum(letters[script] for script in expected) < _LEAST_SHARE * letters.total():
        return "wrong script"
    if _words(query) in _words(passage):
        return "copied from the passage"
    return None


def read_queries(
    text: str | None, passage: str, *, language: str, wanted: int, max_chars: int, cut: bool = False
) -> tuple[list[str], str | None]:
    """The first ``wanted`` usable queries of an answer, each once; where there is none, why not.

    Args:
        text: what the model wrote; None counts as empty.
        passage: the text that it was asked about.
        language: of the queries.
        wanted: how many queries at most.
        max_chars: longest query.
        cut: the answer ended at its limit of tokens, so that its last line is not whole.
    """
    candidates = clean(text or "")
    if cut and candidates:
        candidates.pop()
        if not candidates:
            return [], "cut off"
    faults: list[str] = []
    queries: list[str] = []
    for candidate in dict.fromkeys(candidates):
        fault = find_fault(candidate, passage, language, max_chars)
        if fault is None:
            queries.append(candidate)
        else:
            faults.append(fault)
    if queries:
        return queries[:wanted], None
    # What a model writes besides a bad query ("Sure!") says less than the query.
    return [], next((fault for fault in reversed(faults) if fault != "empty"), "empty")


def _scripts(text: str) -> Counter[str]:
    return Counter(filter(None, map(script_of, text)))


def _words(text: str) -> str:
    """Text without case, punctuation and the like, to compare."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
