"""Training data as lines, as a table of sentence-transformers, or as a folder in BEIR's layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import atomic_open, write_jsonl
from clpl_moe.common.markup import csv_writer
from clpl_moe.convert.layouts import Beir
from clpl_moe.convert.options import ConvertArguments
from clpl_moe.data.formats import DataFile
from clpl_moe.data.schema import training_lines
from clpl_moe.retrieval.collection import is_id

_ROWS_AT_ONCE = 1000
_FLAG_EMBEDDING = ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type")

Lines = Iterator[tuple[str, dict[str, Any]]]


def write_lines(arguments: ConvertArguments, files: Sequence[DataFile], output: Path) -> Counter[str]:
    """Write the lines of files as asked for; returns counts of lines, and of those left out."""
    counts: Counter[str] = Counter()
    if arguments.to == "beir":
        return _write_beir(_lines(files), output)
    if arguments.to == "sentence_transformers":
        negatives = arguments.negatives
        if negatives is None:
            negatives = min(len(line["neg"]) for _, line in _lines(files))
        counts["negatives of each row"] = negatives
        _write_table(output, _columns(negatives), _rows(_lines(files), negatives, counts))
        return +counts
    write_jsonl(
        output, _flag_embedding(_lines(files), counts) if arguments.to != "jsonl" else _own(_lines(files), counts)
    )
    return counts


def _lines(files: Sequence[DataFile]) -> Lines:
    """Place and fields of each line; ``neg`` is a list, perhaps an empty one."""
    for place, record in training_lines(files):
        yield place, {**record, "neg": record.get("neg") or []}


def _own(lines: Lines, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for _, line in lines:
        counts["lines"] += 1
        yield line


def _flag_embedding(lines: Lines, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Lines with the fields that FlagEmbedding reads. It draws from ``neg``, which it needs."""
    for place, line in lines:
        if not line["neg"]:
            fault = "a pair without negatives, which FlagEmbedding cannot train on; mine finds some"
            raise UserError(f"{place}: field 'neg': {fault}")
        counts["lines"] += 1
        yield {name: line[name] for name in _FLAG_EMBEDDING if line.get(name) is not None}


def _columns(negatives: int) -> list[str]:
    numbered = [f"negative_{number}" for number in range(1, negatives + 1)]
    return ["anchor", "positive", *(["negative"] if negatives == 1 else numbered)]


def _rows(lines: Lines, negatives: int, counts: Counter[str]) -> Iterator[list[str]]:
    """A row for each positive, with the first negatives."""
    for _, line in lines:
        if len(line["neg"]) < negatives:
            counts["lines left out: fewer negatives"] += 1
            continue
        counts["lines"] += 1
        counts["negatives left out"] += len(line["neg"]) - negatives
        for positive in line["pos"]:
            counts["rows"] += 1
            yield [line["query"], positive, *line["neg"][:negatives]]


def _write_table(output: Path, columns: list[str], rows: Iterator[list[str]]) -> None:
    ending = output.suffix.lower()
    first = next(rows, None)
    if first is None:
        raise UserError("no row is left: every line has fewer negatives than asked for; lower negatives")

    def all_rows() -> Iterator[list[str]]:
        yield first
        yield from rows

    if ending == ".jsonl":
        write_jsonl(output, (dict(zip(columns, row)) for row in all_rows()))
    elif ending == ".parquet":
        import pyarrow
        import pyarrow.parquet

        schema, remaining = pyarrow.schema([(name, pyarrow.string()) for name in columns]), all_rows()
        with atomic_open(output, "wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
            while some := list(islice(remaining, _ROWS_AT_ONCE)):
                writer.write_table(pyarrow.table(dict(zip(columns, map(list, zip(*some)))), schema))
    else:
        with atomic_open(output) as file:
            writer = csv_writer(file, "\t" if ending == ".tsv" else ",")
            writer.writerow(columns)
            writer.writerows(all_rows())


def _write_beir(lines: Lines, output: Path) -> Counter[str]:
    """Passages and queries, each text once; positives are relevant, negatives are judged and not relevant."""
    ids: dict[str, dict[str, str]] = {"q": {}, "p": {}}  # kind -> text -> id
    used: dict[str, set[str]] = {"q": set(), "p": set()}
    judgements: dict[tuple[str, str], int] = {}
    with Beir(output) as folder:

        def identify(kind: str, text: str, given: Any) -> str:
            known = ids[kind].get(text)
            if known is None:
                number = len(used[kind]) + 1
                while not is_id(given) or given in used[kind]:
                    given, number = f"{kind}{number}", number + 1
                known = ids[kind][text] = given
                used[kind].add(known)
                folder.add_query(known, text) if kind == "q" else folder.add_passage(known, "", text)
            return known

        for _, line in lines:
            query = identify("q", line["query"], line.get("query_id"))
            for field, grade in (("pos", 1), ("neg", 0)):
                given = line.get(f"{field}_ids")
                for number, text in enumerate(line[field]):
                    one = given[number] if isinstance(given, list) and number < len(given) else None
                    key = query, identify("p", text, one)
                    judgements[key] = max(grade, judgements.get(key, 0))
        folder.add_judgements("train", judgements)
    return folder.counts
