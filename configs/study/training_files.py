"""Training files of the study that are made from mined ones: `python configs/study/training_files.py NEGATIVES OUTPUT`.

NEGATIVES is the folder of that name in the runs of `ablate`. For each set NAME, OUTPUT gets

- NAME.jsonl: what was mined;
- NAME.rows.jsonl: each query of a negative as an example of its own, too, with this negative as its positive (a fifth of all);
- NAME.share25.jsonl, NAME.share50.jsonl: a quarter, half of the passages keep their queries, the others have none;
- NAME.one.jsonl: each passage keeps one query, as if one had been written for it;
- NAME.noise50.jsonl: half of the passages have queries of another passage instead of their own.

Files that are there already stay.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from clpl_moe.common.files import write_jsonl

Line = dict[str, Any]
ROWS = 0.2  # share that is kept: training needs no more


def draw(text: str, purpose: str) -> float:
    """A number from 0 to 1 that depends on a passage and a purpose."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {text}".encode()).digest()[:8], "big") / 2**64


def with_queries(line: Line, change: Callable[[str, list[str]], list[str]]) -> Line:
    """A line whose negatives have other queries."""
    pairs = zip(line["neg"], line["neg_q"], strict=True)
    return line | {"neg_q": [(change(text, queries) or None) if queries else None for text, queries in pairs]}


def share(part: float) -> Callable[[str, list[str]], list[str]]:
    return lambda text, queries: queries if draw(text, "share") < part else []


def one(text: str, queries: list[str]) -> list[str]:
    # The lowest hash rather than a draw: lines may hold different ones of a passage's queries.
    return [min(queries, key=lambda query: draw(query, "one"))]


def as_rows(line: Line, rng: random.Random) -> list[Line]:
    """A line, and one for each of its negatives with queries, whose negatives are the line's other passages."""
    found = [{key: line[key] for key in ("query", "pos", "neg")}]
    passages = [line["pos"][0], *line["neg"]]
    known = [None, *line["neg_q"]]
    for place, queries in enumerate(known):
        if queries:
            others = [i for i in range(len(passages)) if i != place]
            negatives = [passages[i] for i in others]
            found.append({"query": rng.choice(queries), "pos": [passages[place]], "neg": negatives})
    return [row for row in found if rng.random() < ROWS]


def noise(lines: list[Line]) -> Callable[[str, list[str]], list[str]]:
    everything = sorted({query for line in lines for queries in line["neg_q"] if queries for query in queries})

    def change(text: str, queries: list[str]) -> list[str]:
        if draw(text, "noise") >= 0.5:
            return queries
        return [everything[int(draw(f"{text} {number}", "which") * len(everything))] for number in range(len(queries))]

    return change


def main(negatives: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)

    def write(name: str, lines: Iterable[Line]) -> None:
        if not (output / name).exists():
            write_jsonl(output / name, lines)

    for folder in sorted(negatives.iterdir()):
        options = json.loads((folder / "options.json").read_text(encoding="utf-8"))
        if options["mine.max_positive_ratio"] == 0 or not (folder / "train.jsonl").is_file():
            continue
        name = options["language"]
        lines = [json.loads(line) for line in (folder / "train.jsonl").open(encoding="utf-8")]
        kept = ("query", "pos", "neg", "neg_q")
        lines = [{key: line[key] for key in kept} for line in lines]
        rng = random.Random(name)
        changes = {"share25": share(0.25), "share50": share(0.5), "one": one, "noise50": noise(lines)}
        write(f"{name}.jsonl", lines)
        if name in ("korquad_ko", "pquad_fa"):
            write(f"{name}.rows.jsonl", (row for line in lines for row in as_rows(line, rng)))
            for kind, change in changes.items():
                write(f"{name}.{kind}.jsonl", (with_queries(line, change) for line in lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
