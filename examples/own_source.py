"""Your own source for ``prepare``: ``python examples/own_source.py questions.csv``.

The CSV file has the columns ``question`` and ``paragraph``, a pair a line. The collection goes to ``collections/ko``.
"""

import csv
import sys
from dataclasses import dataclass, field
from pathlib import Path

from clpl_moe.prepare import Passage, Source, Split, prepare, register_source


@register_source("table")
@dataclass
class Table(Source):
    """Questions and the paragraphs that answer them, in a CSV file."""

    table: str = field(metadata={"help": "CSV file with the columns question and paragraph"})
    delimiter: str = field(default=",", metadata={"help": "what separates the columns"})

    def rows(self):
        with Path(self.table).open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file, delimiter=self.delimiter)

    def read_passages(self):
        for number, text in enumerate(dict.fromkeys(row["paragraph"] for row in self.rows())):
            yield Passage(id=f"p{number}", text=text)

    def read_splits(self):
        ids = {passage.text: passage.id for passage in self.read_passages()}
        queries, judgements = {}, {}
        for number, row in enumerate(self.rows()):
            queries[f"q{number}"] = row["question"]
            judgements[f"q{number}", ids[row["paragraph"]]] = 1
        return {"train": Split(queries, judgements)}


if __name__ == "__main__":
    prepared = prepare(table=sys.argv[1], language="ko", output="collections", overwrite=True)
    print(f"wrote {prepared.folder}:", dict(prepared.counts))
