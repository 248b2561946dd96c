"""Folders in BEIR's and MTEB's layouts, and a collection written as one, or as training lines."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from clpl_moe.common.errors import OptionError, UserError, at
from clpl_moe.common.files import read_jsonl, write_jsonl
from clpl_moe.common.output import atomic_dir
from clpl_moe.convert.options import ConvertArguments
from clpl_moe.retrieval.collection import Collection, language_folder


class Beir:
    """A folder that is written line by line, and gets its name when the block ends well.

    With ``mteb``, judgements are JSON lines, and a README tells ``datasets`` which file is which configuration, as the
    data sets of MTEB on the hub have them.
    """

    def __init__(self, folder: Path, mteb: bool = False) -> None:
        self.folder, self.mteb = folder, mteb
        self.counts: Counter[str] = Counter()
        self._splits: list[str] = []

    def __enter__(self) -> Beir:
        self._stack = contextlib.ExitStack()
        self._place = self._stack.enter_context(atomic_dir(self.folder))
        (self._place / "qrels").mkdir()
        self._files: dict[str, IO[str]] = {
            name: self._stack.enter_context((self._place / f"{name}.jsonl").open("w", encoding="utf-8"))
            for name in ("corpus", "queries")
        }
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self.mteb:
            (self._place / "README.md").write_text(self._readme(), encoding="utf-8")
        self._stack.__exit__(*error)

    def _add(self, name: str, record: dict[str, str]) -> None:
        self._files[name].write(json.dumps(record, ensure_ascii=False) + "\n")

    def add_passage(self, identifier: str, title: str, text: str) -> None:
        self.counts["passages"] += 1
        self._add("corpus", {"_id": identifier, "title": title, "text": text})

    def add_query(self, identifier: str, text: str) -> None:
        self.counts["queries"] += 1
        self._add("queries", {"_id": identifier, "text": text})

    def add_judgements(self, split: str, judgements: Mapping[tuple[str, str], int]) -> None:
        """Those of a split: query id and passage id -> relevance."""
        self._splits.append(split)
        self.counts[f"{split} judgements: relevant"] = sum(grade > 0 for grade in judgements.values())
        self.counts[f"{split} judgements: not relevant"] = sum(grade <= 0 for grade in judgements.values())
        names = ("query-id", "corpus-id", "score")
        rows = ((query, passage, grade) for (query, passage), grade in judgements.items())
        if self.mteb:
            write_jsonl(self._place / "qrels" / f"{split}.jsonl", (dict(zip(names, row)) for row in rows))
            return
        with (self._place / "qrels" / f"{split}.tsv").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines("\t".join(map(str, row)) + "\n" for row in (names, *rows))

    def _readme(self) -> str:
        configs = {
            "corpus": {"corpus": "corpus.jsonl"},
            "queries": {"queries": "queries.jsonl"},
            "default": {split: f"qrels/{split}.jsonl" for split in self._splits},
        }
        lines = ["---", "configs:"]
        for config, splits in configs.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            for split, path in splits.items():
                lines += [f"  - split: {split}", f"    path: {path}"]
        return "\n".join([*lines, "---", ""])


def write_collection(arguments: ConvertArguments, output: Path) -> Counter[str]:
    """Write a collection as asked for; returns counts of what was written."""
    folder = language_folder(str(arguments.collection), str(arguments.language))
    there = {path.name.removesuffix("_queries.jsonl") for path in folder.glob("*_queries.jsonl")} - {"positive"}
    splits = arguments.splits or sorted(there)
    if not splits:
        raise UserError(f"{at(folder)}: no collection with queries, expected corpus.jsonl and <split>_queries.jsonl")
    if len(set(splits)) < len(splits):
        raise OptionError("splits", f"found {' '.join(splits)}, expected each once")
    loaded = {s: Collection.load(str(arguments.collection), str(arguments.language), s) for s in splits}
    if arguments.to == "jsonl":
        return _write_training(loaded, output)
    with Beir(output, mteb=arguments.to == "mteb") as beir:
        for _, record in read_jsonl(folder / "corpus.jsonl"):
            beir.add_passage(str(record["id"]), record.get("title") or "", record["text"])
        texts: dict[str, str] = {}
        for split, collection in loaded.items():
            for identifier, text in zip(collection.query_ids, collection.queries):
                if identifier not in texts:
                    beir.add_query(identifier, text)
                elif texts[identifier] != text:
                    fault = f"'{identifier}' is another query in another split; convert the two on their own (splits)"
                    raise UserError(f"{at(folder / f'{split}_queries.jsonl', field='id')}: {fault}")
                texts[identifier] = text
            judged = collection.qrels.items()
            beir.add_judgements(split, {(q, p): grade for q, found in judged for p, grade in found.items()})
    return beir.counts


def _write_training(loaded: Mapping[str, Collection], output: Path) -> Counter[str]:
    counts: Counter[str] = Counter()

    def lines() -> Iterator[dict[str, Any]]:
        for collection in loaded.values():
            judged = {p for found in collection.qrels.values() for p in found}
            rows = {p: row for row, p in enumerate(collection.passage_ids) if p in judged}
            for query_id, query in zip(collection.query_ids, collection.queries):
                grades = collection.qrels.get(query_id, {})
                texts = {p: collection.passages[rows[p]] for p in grades if p in rows}
                ids = {
                    "pos": [p for p, text in texts.items() if text and grades[p] > 0],
                    "neg": [p for p, text in texts.items() if text and grades[p] <= 0],
                }
                counts["judged passages left out: empty"] += sum(not text for text in texts.values())
                if not ids["pos"]:
                    counts["queries left out: no relevant passage"] += 1
                    continue
                counts["lines"] += 1
                own = {name: [texts[p] for p in some] for name, some in ids.items()}
                yield {"query_id": query_id, "query": query, **own, **{f"{n}_ids": some for n, some in ids.items()}}

    made = lines()
    if (first := next(made, None)) is None:
        raise UserError(
            f"no line is left: no query of {', '.join(loaded)} has a relevant passage with text in the corpus"
        )
    write_jsonl(output, itertools.chain([first], made))
    return +counts
