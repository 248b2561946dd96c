"""Training lines that name queries and passages by ids, and the tables with their texts, as MS MARCO has them.

- The tables have an id, a tab and a text a line (``queries.train.tsv``, ``collection.tsv``). They may be larger than memory:
  held are a hash of each id and the place of its line.
- A line has the ids of a query, a positive and perhaps negatives, with tabs or white space between them
  (``qidpidtriples.train.full.2.tsv``), or as a list in JSON, as ColBERT's triples.
- A file whose first line has TREC's four columns (``qrels.train.tsv``) gives a pair for each relevant passage.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from clpl_moe.common.compressed import SUFFIXES
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import read_lines

_MARK = b"\xef\xbb\xbf"
_GRADE = re.compile(r"[+-]?\d+(\.0*)?", re.ASCII)


class TextsById:
    """The texts of a table, by id."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if self._path.suffix.lower() in SUFFIXES:
            raise UserError(f"{at(path)}: texts are read here and there in this file; decompress it first")
        hashes, starts = array("q"), array("q")
        rows = read_lines(path, expected="an id, a tab and a text a line")
        for number, start, raw in tqdm(rows, f"look up {self._path.name}", unit="line", delay=2, leave=False):
            identifier, *texts = raw.removeprefix(_MARK).split(b"\t")
            if len(texts) != 1:
                raise UserError(f"{at(path, number)}: found {len(texts) + 1} cells, expected an id, a tab and a text")
            hashes.append(hash(identifier))
            starts.append(start)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._starts = np.asarray(hashes)[order], np.asarray(starts)[order]
        self._file = self._path.open("rb")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def get(self, identifier: str) -> str | None:
        """The text of an id, of several the first; None where there is none."""
        wanted = identifier.encode()
        place = int(np.searchsorted(self._hashes, hash(wanted)))
        while place < len(self._hashes) and self._hashes[place] == hash(wanted):
            self._file.seek(int(self._starts[place]))
            found, _, text = self._file.readline().removeprefix(_MARK).partition(b"\t")
            if found == wanted:
                try:
                    return text.decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{at(self._path)}: the text of '{identifier}' is not UTF-8 ({error.reason})"
                    ) from None
            place += 1
        return None


def lines_by_ids(
    path: str, queries: TextsById, corpus: TextsById
) -> Iterator[tuple[int, dict[str, Any] | None, list[str]]]:
    """Number, record and faults of each line; those of judgements that say 0 are passed over."""
    is_qrels = None
    for number, _, raw in read_lines(path, expected="the ids of a query, a positive and negatives a line"):
        try:
            ids = _ids(raw)
        except ValueError:
            yield number, None, ["found no ids, expected those of a query, a positive and negatives"]
            continue
        if is_qrels is None:
            is_qrels = len(ids) == 4 and ids[1] in ("0", "Q0")
        if is_qrels:
            if len(ids) != 4 or not _GRADE.fullmatch(ids[3]):
                expected = "a query's id, 0, a passage's id and a whole number, as on the first line"
                yield number, None, [f"found {' '.join(ids)!r:.60}, expected {expected}"]
                continue
            if float(ids[3]) <= 0:
                continue
            ids = [ids[0], ids[2]]
        if len(ids) < 2:
            yield number, None, ["found 1 id, expected those of a query, a positive and negatives"]
            continue
        query, passages = queries.get(ids[0]), [corpus.get(one) for one in ids[1:]]
        faults = [] if query is not None else [f"field 'query': no text of id '{ids[0]}' in the file queries="]
        missing = [one for one, text in zip(ids[1:], passages) if text is None]
        if missing:
            faults.append(f"field 'pos' or 'neg': no text of id {', '.join(map(repr, missing))} in the file corpus=")
        record = {
            **{"query_id": ids[0], "query": query, "pos": passages[:1], "neg": passages[1:]},
            **{"pos_ids": ids[1:2], "neg_ids": ids[2:]},
        }
        yield number, None if faults else record, faults


def _ids(raw: bytes) -> list[str]:
    text = raw.decode("utf-8-sig").strip()
    if not text.startswith("["):
        return text.split("\t") if "\t" in text else text.split()
    ids = json.loads(text)
    if not all(type(one) in (str, int) for one in ids):
        raise ValueError("not ids")
    return [str(one) for one in ids]
