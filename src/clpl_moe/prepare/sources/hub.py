"""Retrieval data sets of the Hugging Face hub, as MTEB and BEIR lay them out.

A data set has three configurations, whose names may begin with a subset's (``ko-corpus``):

- ``corpus``: ``_id`` or ``id``, ``title`` (may be missing), ``text``;
- ``queries``: ``_id`` or ``id``, ``text``;
- ``default`` or ``qrels``, of a subset also its bare name: ``query-id``, ``corpus-id``, ``score``, in the splits of the data.

A split takes the queries that it judges. Passages of several splits are put together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from clpl_moe.common.errors import OptionError, UserError, at
from clpl_moe.common.hub_data import config_names, load_rows
from clpl_moe.common.options import option
from clpl_moe.prepare.source import Passage, Source, Split, register_source
from clpl_moe.retrieval.collection import ID, check_id, check_relevance, read_id, read_relevance

_NAMES = {"corpus": ("corpus",), "queries": ("queries",), "judgements": ("default", "qrels")}
_FIELDS = {"id": ("_id", "id"), "query": ("query-id", "query_id"), "passage": ("corpus-id", "corpus_id")}


@register_source("hub")
@dataclass
class Hub(Source):
    """A retrieval data set of the hub."""

    id_field: ClassVar[str] = "_id"

    hub: str = option("retrieval data set of the hub, such as mteb/scifact")
    subset: str | None = option("its part, such as ko, where its configurations have names such as ko-corpus", None)
    revision: str | None = option("commit, branch or tag; not given: the newest", None)
    splits: list[str] | None = option("splits to read, all unless named", None)

    def default_language(self) -> str | None:
        return self.subset

    def files(self) -> list[str]:
        return [self.hub] if Path(self.hub).exists() else []

    def read_passages(self) -> Iterator[Passage]:
        seen: set[str] = set()
        parts = self._load("corpus")
        for name, rows in parts.items():
            for number, row in enumerate(rows, 1):
                place = f"{self.hub}: corpus, {name} {number}"
                identifier = self._identifier(place, row, "id")
                if len(parts) > 1:
                    if identifier in seen:
                        continue  # a passage of several splits
                    seen.add(identifier)
                title, text = row.get("title") or "", row.get("text")
                if not isinstance(text, str) or not isinstance(title, str):
                    raise UserError(f"{at(place, field='text')}: found {text!r:.50}, expected a string")
                yield Passage(identifier, text, title, place)

    def read_splits(self) -> dict[str, Split]:
        queries: dict[str, str] = {}
        for name, rows in self._load("queries").items():
            for number, row in enumerate(rows, 1):
                place = f"{self.hub}: queries, {name} {number}"
                text = row.get("text")
                if not isinstance(text, str) or not text.strip():
                    raise UserError(f"{at(place, field='text')}: found {text!r:.50}, expected a query")
                identifier = self._identifier(place, row, "id")
                if queries.setdefault(identifier, text) != text:
                    raise UserError(f"{at(place, field='_id')}: '{identifier}' had another text before")
        splits, found = {}, self._load("judgements")
        for split in self.splits or found:
            if split not in found:
                raise OptionError("splits", f"found {split!r}, expected one of {', '.join(found)}")
            judgements: dict[tuple[str, str], int] = {}
            for number, row in enumerate(found[split], 1):
                place = f"{self.hub}: judgements, {split} {number}"
                query_id, passage_id = (self._identifier(place, row, kind) for kind in ("query", "passage"))
                if (grade := read_relevance(row.get("score"))) is None:
                    raise UserError(f"{at(place, field='score')}: found {row.get('score')!r}, expected an integer")
                check_relevance(grade, place, None, "score")
                if query_id not in queries:
                    raise UserError(f"{at(place, field='query-id')}: '{query_id}' is not an id of a query")
                if judgements.setdefault((query_id, passage_id), grade) != grade:
                    raise UserError(f"{place}: judges '{passage_id}' for query '{query_id}' otherwise than before")
            judged = {query_id for query_id, _ in judgements}
            splits[split] = Split({i: text for i, text in queries.items() if i in judged}, judgements)
        return splits

    @staticmethod
    def _identifier(place: str, row: dict[str, Any], kind: str) -> str:
        name = next((name for name in _FIELDS[kind] if name in row), None)
        if name is None:
            raise UserError(f"{at(place, field=_FIELDS[kind][0])}: missing; there are {', '.join(row)}")
        identifier = read_id(row[name])
        if not isinstance(identifier, str):
            raise UserError(f"{at(place, field=name)}: found {row[name]!r:.50}, expected {ID}")
        check_id(identifier, place, None, name)
        return identifier

    def _load(self, kind: str) -> dict[str, Any]:
        """The splits of a part of the data set; rows lie memory-mapped in the cache."""
        return dict(load_rows(self.hub, self._configs[kind], revision=self.revision))

    @cached_property
    def _configs(self) -> dict[str, str]:
        there = config_names(self.hub, self.revision)
        found = {}
        for kind, names in _NAMES.items():
            wanted = names if self.subset is None else tuple(f"{self.subset}-{name}" for name in names)
            if kind == "judgements" and self.subset is not None:
                wanted = (*wanted, self.subset)
            found[kind] = next((name for name in wanted if name in there), "")
            if not found[kind]:
                hint = "set subset, or another one" if any("-" in name for name in there) else "expected MTEB's layout"
                listed = ", ".join(sorted(there)[:20])
                raise UserError(f"{at(self.hub)}: no configuration {' or '.join(wanted)}; {hint}; it has {listed}")
        return found
