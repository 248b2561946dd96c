"""From what a language model wrote to verdicts about the passages of a question."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

from clpl_moe.llm.answers import without_reasoning

Answers = Literal["yes", "partly", "no"]


class Verdict(NamedTuple):
    """Whether a passage answers the query, and a query that it does answer, where one was asked for."""

    answers: Answers
    query: str | None = None


def answer_schema(with_queries: bool) -> dict[str, Any]:
    """The JSON schema of an answer, for servers that keep to one."""
    fields: dict[str, Any] = {
        "passage": {"type": "integer"},
        "answers": {"type": "string", "enum": ["yes", "partly", "no"]},
    }
    if with_queries:
        fields["query"] = {"type": "string"}
    strict = {"type": "object", "additionalProperties": False}
    entry = {**strict, "properties": fields, "required": list(fields)}
    verdicts = {"type": "array", "items": entry}
    return {**strict, "properties": {"verdicts": verdicts}, "required": ["verdicts"]}


# Also what models write that do not keep to the three words.
_VERDICT = re.compile(
    r"(?P<partly>part(?:ly|ial)|in part\b|부분|일부|تا ?حدی|بخشی|आंशिक)"
    r"|(?P<yes>(?:yes|true|예|네|بله|آری|हाँ|हां)(?!\w))"
    r"|(?P<no>(?:no|none|false|خیر|نه|नहीं)(?!\w)|아니)"
)
_NUMBERS = ("passage", "number", "id", "index", "no")
_LABELS = ("answers", "answer", "verdict", "label", "judgement", "judgment")
# "[2] no", "Passage 2: no", "| 2 | no |"
_LINE = re.compile(
    r"^[^\w\n]*(?:(?:passage|문단|متن|अनुच्छेद)[^\w\n]*)?(\d{1,4})[^\w\n]+(?:[^\W\d]+[^\w\n]*[:：][^\w\n]*)?(.+)$",
    re.M | re.I,
)


def read_verdicts(text: str | None, count: int, cut: bool = False) -> dict[int, Verdict]:
    """The verdicts in an answer about ``count`` passages, by number from 1: of JSON, whole or in part, else of its lines.

    A passage with two different verdicts has none. The last line of an answer that was ``cut`` is not whole.
    """
    text = without_reasoning(text or "")
    found = list(_of_json(text)) or list(_of_lines(text.rpartition("\n")[0] if cut else text))
    if not found and count == 1 and not cut and (alone := _verdict(text)):
        found = [(1, alone, None)]
    verdicts: dict[int, Verdict] = {}
    contradicted = set()
    for number, answers, query in found:
        if verdicts.setdefault(number, Verdict(answers, query)).answers != answers:
            contradicted.add(number)
    return {n: verdict for n, verdict in verdicts.items() if 1 <= n <= count and n not in contradicted}


def _of_json(text: str) -> Iterator[tuple[int, Answers, str | None]]:
    """Number, verdict and query of the objects in a text; those of a list that was cut off stand for themselves."""
    decoder, place = json.JSONDecoder(strict=False), 0
    while (start := text.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            place = start + 1
            continue
        yield from _of_value(value)


def _of_lines(text: str) -> Iterator[tuple[int, Answers, None]]:
    for line in _LINE.finditer(text):
        if answers := _verdict(line[2]):
            yield int(line[1]), answers, None


def _of_value(value: Any) -> Iterator[tuple[int, Answers, str | None]]:
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += reversed(value)
        if not isinstance(value, dict):
            continue
        number = next((n for name in _NUMBERS if (n := _number(value.get(name))) is not None), None)
        answers = next((a for name in _LABELS if (a := _verdict(value.get(name))) is not None), None)
        if number is not None and answers is not None:
            query = value.get("query")
            yield number, answers, query if isinstance(query, str) else None
            continue
        for name, inner in reversed(value.items()):  # {"1": "yes", "2": "no"}, or a list by its name
            n, a = _number(name), _verdict(inner)
            if n is not None and a is not None:
                yield n, a, None
            else:
                stack.append(inner)


def _number(value: Any) -> int | None:
    if isinstance(value, str) and (found := re.fullmatch(r"\D{0,12}(\d{1,4})\D?", value)):
        return int(found[1])
    return value if type(value) is int else None


def _verdict(value: Any) -> Answers | None:
    """The verdict with which a text begins."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    found = _VERDICT.match(value.strip(" \t\n*_\"'`.,:;-").casefold()) if isinstance(value, str) else None
    return cast(Answers, found.lastgroup) if found else None
