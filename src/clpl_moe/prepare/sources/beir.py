"""BEIR's layout (Thakur et al. 2021, arXiv:2104.08663), which many data sets share.

- ``corpus.jsonl``: ``_id``, ``title`` (may be empty), ``text``;
- ``queries.jsonl``: ``_id``, ``text``, of all splits together;
- ``qrels/<split>.tsv``: query id, passage id, score, after a line with these names; or TREC's four columns
  (``.tsv``, ``.txt``, ``.trec``), or JSON lines with the three names (``.jsonl``).

The JSONL files may be compressed (``.jsonl.gz``). A split takes the queries that it judges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from clpl_moe.common.compressed import plain_name
from clpl_moe.common.errors import UserError, at, no_such
from clpl_moe.common.options import option
from clpl_moe.prepare.files import collect_queries, read_passages, read_qrels, read_texts
from clpl_moe.prepare.source import Passage, Source, Split, register_source

_QRELS = (".tsv", ".txt", ".trec", ".jsonl")


@register_source("beir")
@dataclass
class Beir(Source):
    """A folder in BEIR's layout."""

    id_field: ClassVar[str] = "_id"

    beir: str = option("folder with corpus.jsonl, queries.jsonl and qrels/<split>.tsv")
    splits: list[str] | None = option("splits to read, all unless named", None)

    def files(self) -> list[str]:
        return [self.beir]

    def read_passages(self) -> Iterator[Passage]:
        return read_passages([self._find("corpus.jsonl")], self.id_field)

    def read_splits(self) -> dict[str, Split]:
        if not Path(self.beir).is_dir():
            raise UserError(f"{at(self.beir)}: {no_such('folder', self.beir)} in BEIR's layout")
        self._find("corpus.jsonl")
        path, qrels = self._find("queries.jsonl"), self._find_qrels()
        texts = ((number, i, record["text"]) for number, i, record in read_texts(path, self.id_field))
        queries = collect_queries(path, texts, self.id_field)
        splits = {}
        for split, qrels_path in qrels.items():
            judgements = read_qrels(qrels_path, ("query-id", "corpus-id", "score"), queries, path, header=True)
            if not judgements:
                raise UserError(f"{at(qrels_path)}: holds no judgement")
            judged = {query_id for query_id, _ in judgements}
            splits[split] = Split({i: text for i, text in queries.items() if i in judged}, judgements)
        return splits

    def _find(self, name: str) -> Path:
        path = Path(self.beir, name)
        for candidate in (path, Path(f"{path}.gz")):
            if candidate.is_file():
                return candidate
        raise UserError(f"{at(path)}: no such file; BEIR's layout is corpus.jsonl, queries.jsonl, qrels/<split>.tsv")

    def _find_qrels(self) -> dict[str, Path]:
        folder = Path(self.beir, "qrels")
        qrels: dict[str, Path] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = Path(plain_name(path))
            if name.suffix in _QRELS and path.is_file():
                split = path.name[: len(name.stem)]
                if split in qrels:
                    raise UserError(f"{at(path)}: the same split as {qrels[split].name}; keep one of the two")
                qrels[split] = path
        there = f"the splits here are {', '.join(qrels)}" if qrels else "the folder holds none"
        for split in self.splits or ():
            if split not in qrels:
                raise UserError(f"{at(folder / f'{split}.tsv')}: no such file; {there}")
        if not qrels:
            raise UserError(f"{at(folder)}: no <split>.tsv, expected one for each split such as test.tsv")
        return {split: qrels[split] for split in self.splits or qrels}
