"""Training data under other names: the columns of sentence-transformers and of tables as the fields of this package.

A row of such a table is a query, its passages and perhaps negatives, one text a column: ``anchor``, ``positive``,
``negative_1`` and so on. Other names can be given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from clpl_moe.common.errors import UserError

SCORES = ("pos_scores", "neg_scores", "pos_guide_scores", "neg_guide_scores")
FIELDS = ("query", "pos", "neg", "neg_q", *SCORES, "prompt", "type")
_KNOWN = {
    "query": re.compile("query|anchor|question"),
    "pos": re.compile(r"(pos|positives?|answers?)(_\d+)?"),
    "neg": re.compile(r"(neg|negatives?)(_\d+)?"),
}
# Of Tevatron and DPR: objects with a title and a text. Beside them 'answers' are short ones.
_OBJECTS = {
    "pos": ("positive_passages", "positive_ctxs"),
    "neg": ("negative_passages", "hard_negative_ctxs", "negative_ctxs"),
}
_IDS = ("docid", "id", "_id", "passage_id")  # of such an object, whichever it has
EXPECTED = "query and pos, anchor and positive, question and answer, each perhaps with neg, negative or negative_1, ..."
_LIST_AS_TEXT = re.compile(r"""\[\s*(['"]).*\1\s*\]""", re.DOTALL)


class Columns:
    """Which columns hold the fields.

    Args:
        given: field -> name of the column, or of several joined by ``+``; the others are known by their names.
    """

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = {field: names.split("+") for field, names in given.items()}
        self._found: dict[tuple[str, ...], dict[str, list[str]]] = {}

    def of(self, names: Iterable[str]) -> dict[str, list[str]]:
        """For each field the columns that hold it, among those of a table or object with these ``names``."""
        key = tuple(names)
        if (found := self._found.get(key)) is None:
            found = self._found[key] = self._choose(key)
        return found

    def _choose(self, names: tuple[str, ...]) -> dict[str, list[str]]:
        taken = {name for chosen in self._given.values() for name in chosen}
        found = {field: [name for name in chosen if name in names] for field, chosen in self._given.items()}
        for field in FIELDS:
            if field in self._given:
                continue
            objects = [name for name in _OBJECTS.get(field, ()) if name in names and name not in taken]
            if field in names and field not in taken:
                found[field] = [field]
            elif objects:
                found[field] = objects[:1]
            elif field in _KNOWN:
                same = [name for name in names if name not in taken and _KNOWN[field].fullmatch(name.lower())]
                found[field] = same[:1] if field == "query" else sorted(same, key=_number)
        return {field: columns for field, columns in found.items() if columns}

    def refuse(self, place: str, names: Iterable[str], hint: str) -> None:
        """Raise :class:`UserError` where a table with these columns holds no pairs, or ones that a label judges."""
        names = list(names)
        found, there = self.of(names), ", ".join(names)
        for field, chosen in self._given.items():
            for name in chosen:
                if name not in names:
                    raise UserError(f"{place}: no column '{name}', which is to be {field}; it has {there}")
        if "query" not in found or "pos" not in found:
            raise UserError(f"{place}: found the columns {there}; expected {EXPECTED}; {hint}")
        if (fault := self.label_fault(names)) is not None:
            raise UserError(f"{place}: {fault}")

    def label_fault(self, names: Iterable[str]) -> str | None:
        """What is wrong where a label says which rows are pairs: the others would be trained as such."""
        found = self.of(names)
        labels = [name for name in names if name.lower() in ("label", "labels")]
        if not labels or "neg" in found or found.get("pos", ["pos"]) == ["pos"]:
            return None
        return f"field '{labels[0]}': says which rows are pairs; keep those that are, and remove the field"

    def fields(
        self, record: dict[str, Any], *, table: bool = False, text_cells: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """A record with this package's fields, and for each of these the column that it came from, for messages.

        In a ``table`` a cell may hold one text of a list; with ``text_cells``, as in CSV, an empty one holds nothing.
        """
        if not self._given and not table and "query" in record and "pos" in record:
            return record, {}
        columns = self.of(record)
        used = {name for names in columns.values() for name in names}
        fields = {name: value for name, value in record.items() if name not in used}
        origin: dict[str, str] = {}
        for field, names in columns.items():
            origin[field] = names[0]
            if names == [field] and not table:
                fields[field] = record[field]
            elif field in ("pos", "neg"):
                texts: list[Any] = []
                ids: list[Any] = []
                fields[field] = texts
                for name in names:
                    value = record[name]
                    if value is None or (text_cells and not value):
                        continue
                    for text in value if isinstance(value, list) else [value]:
                        origin[f"{field}[{len(texts)}]"] = name
                        texts.append(_text_of(text))
                        ids += _id_of(text)
                if ids and len(ids) == len(texts):
                    fields.setdefault(f"{field}_ids", ids)
            else:
                value = record[names[0]]
                if text_cells and not value and field != "query":
                    value = None
                if field in ("neg_q", *SCORES) and not isinstance(value, list | None):
                    value = [value]
                fields[field] = value
        return fields, {field: name for field, name in origin.items() if field != name}


def is_list_as_text(text: Any) -> bool:
    """Whether a cell holds a list that was written as a text, as pandas writes a column of lists to CSV."""
    return isinstance(text, str) and _LIST_AS_TEXT.fullmatch(text.strip()) is not None


def rename(fault: str, origin: Mapping[str, str]) -> str:
    """A fault of a field with the name of the column that it came from."""
    match = re.match(r"field '([^']+)'", fault)
    if match is None or match[1] not in origin:
        return fault
    return f"field '{origin[match[1]]}'{fault[match.end() :]}"


def _text_of(passage: Any) -> Any:
    """The text of a passage that is an object, after its title, as collections join them; others stay as they are."""
    if not isinstance(passage, dict) or not isinstance(passage.get("text"), str):
        return passage
    title = passage.get("title")
    return f"{title if isinstance(title, str) else ''} {passage['text']}".strip()


def _id_of(passage: Any) -> list[str]:
    """The id of a passage that is an object, if it has one."""
    found = [passage[name] for name in _IDS if passage.get(name) is not None] if isinstance(passage, dict) else []
    return [str(one) for one in found[:1] if type(one) in (str, int)]


def _number(name: str) -> int:
    """The number at the end of a column's name: ``negative_10`` follows ``negative_9``."""
    digits = re.search(r"\d+$", name)
    return int(digits[0]) if digits else 0
