"""How far rows of a comparison by `ablate` differ, with intervals over seeds and queries.

    python configs/study/compare.py RUNS OUTPUT.json ROW-REFERENCE [ROW-REFERENCE ...] [--seeds 11 12 13] [--split test]
        [--values VALUES.json] [--sentence_transformers LINES.jsonl ...]

LINES.jsonl are of `sentence_transformers_rows.py`, and make the row `sentence_transformers`. VALUES.json gets the value of each
query in RUNS, and keeps those of runs whose folders are gone: a study can go on elsewhere.

A row is paired with its reference: same language, seed and query. The interval has 95% of 10,000 bootstrap draws of seeds and
of passages with all their queries, as queries of one passage rise and fall together. Both rows get the same draws. The base
model has one run, which stands beside every seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from clpl_moe.common.files import write_json
from clpl_moe.retrieval.collection import Collection

DRAWS, METRIC = 10_000, "nDCG@5"
Values = dict[str, dict[int | None, dict[str, float]]]  # language -> seed -> query -> value


def read(runs: Path, row: str) -> Values:
    """The value of each query in the finished runs of a row."""
    found: Values = {}
    for path in sorted(runs.glob("runs/*/run.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["row"] == row:
            with (path.parent / "results/per_query.csv").open(encoding="utf-8", newline="") as file:
                values = {line["query_id"]: float(value_of(line)) for line in csv.DictReader(file)}
            found.setdefault(run["language"], {})[run["seed"]] = values
    return found


def read_lines(paths: list[Path], split: str) -> Values:
    """The values of each query in files of `sentence_transformers_rows.py`."""
    found: Values = {}
    for line in (json.loads(text) for path in paths for text in path.open(encoding="utf-8")):
        if line["split"] == split:
            found.setdefault(line["language"], {})[line["seed"]] = line["queries"]
    return found


def keep(path: Path, rows: dict[str, Values], of: dict[str, dict[str, str]]) -> dict[str, Values]:
    """Add values to a file, and return all that it has of these rows: row -> language -> seed -> values in the order of ids."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for row, languages in rows.items():
        for language, runs in languages.items():
            lines = known.setdefault(row, {}).setdefault(language, {})
            for seed, values in runs.items():
                lines[json.dumps(seed)] = " ".join(f"{values[query]:.4g}" for query in sorted(values))
    write_json(path, known)
    return {
        row: {
            language: {
                json.loads(seed): dict(zip(sorted(of[language]), map(float, line.split()), strict=True))
                for seed, line in lines.items()
            }
            for language, lines in known.get(row, {}).items()
            if language in of
        }
        for row in rows
    }


def value_of(line: dict[str, str]) -> str:
    return next(value for name, value in line.items() if name.partition(" ")[0] == METRIC)


def similarities(runs: Path, row: str) -> dict[str, dict[str, float]]:
    """Mean cosines at the end of the training, over the seeds: of queries with their positives and negatives."""
    found: dict[str, list[dict[str, float]]] = {}
    for path in sorted(runs.glob("runs/*/run.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["row"] == row and run["seed"] is not None:
            lines = map(json.loads, (path.parent / "model/metrics.jsonl").open(encoding="utf-8"))
            found.setdefault(run["language"], []).append([line for line in lines if "positive_similarity" in line][-1])
    kinds = [
        kind for kind in ("positive", "negative") if all(f"{kind}_similarity" in x for v in found.values() for x in v)
    ]
    return {
        language: {kind: round(float(np.mean([line[f"{kind}_similarity"] for line in lines])), 4) for kind in kinds}
        for language, lines in found.items()
    }


def passages(directory: Path, language: str, split: str) -> dict[str, str]:
    """For each query a passage that answers it."""
    qrels = Collection.load(directory, language, split).qrels
    return {query: next(iter(judged)) for query, judged in qrels.items()}


def gaps(
    row: Values, reference: Values, language: str, seeds: list[int], of: dict[str, str]
) -> tuple[Any, Any, list[int]]:
    """Sums of the differences, seed × passage; number of queries of each passage; the seeds that both rows have."""
    ours, theirs = row.get(language, {}), reference.get(language, {})
    common = [seed for seed in seeds if seed in ours and (seed in theirs or None in theirs)]
    queries = sorted(of)
    groups = {passage: place for place, passage in enumerate(dict.fromkeys(of[query] for query in queries))}
    places = np.array([groups[of[query]] for query in queries])
    sums = np.zeros((len(common), len(groups)))
    for line, seed in zip(sums, common, strict=True):
        other = theirs.get(seed, theirs.get(None, {}))
        np.add.at(line, places, [ours[seed][query] - other[query] for query in queries])
    return sums, np.bincount(places), common


def bootstrap(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator, drawn: np.ndarray) -> np.ndarray:
    """Means of DRAWS samples; `drawn` has the seeds of each."""
    found = np.empty(DRAWS)
    for number in range(DRAWS):
        chosen = rng.integers(len(counts), size=len(counts))
        found[number] = sums[drawn[number]].mean(axis=0)[chosen].sum() / counts[chosen].sum()
    return found


def interval(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in np.quantile(values, [0.025, 0.975])]


def compare(
    found: dict[str, Values], row: str, reference: str, seeds: list[int], of: dict[str, dict[str, str]]
) -> dict[str, Any]:
    ours, theirs = found[row], found[reference]
    rng = np.random.default_rng(1)
    line: dict[str, Any] = {"row": row, "reference": reference, "seeds": 0, "languages": {}}
    drawn, of_all, means = None, [], []
    for language, answers in of.items():
        sums, counts, common = gaps(ours, theirs, language, seeds, answers)
        if not common:
            continue
        if drawn is None or len(common) != line["seeds"]:  # the same seeds in all languages, where they have the same
            drawn = rng.integers(len(common), size=(DRAWS, len(common)))
        line["seeds"] = len(common)
        samples = bootstrap(sums, counts, rng, drawn)
        mean = sums.mean(axis=0).sum() / counts.sum()
        by_seed = [round(float(value), 4) for value in sums.sum(axis=1) / counts.sum()]
        line["languages"][language] = {
            "difference": round(float(mean), 4),
            "interval": interval(samples),
            "seeds": common,
            "by_seed": by_seed,
        }
        of_all.append(samples)
        means.append(mean)
    if len(of_all) == len(of) and len({tuple(cell["seeds"]) for cell in line["languages"].values()}) == 1:
        line["average"] = {"difference": round(float(np.mean(means)), 4), "interval": interval(np.mean(of_all, axis=0))}
    return line


def text(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    signed = "{:+.4f} [{:+.4f}, {:+.4f}]".format(cell["difference"], *cell["interval"])
    return signed.replace("-", "−")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("pairs", nargs="+")
    parser.add_argument("--seeds", nargs="*", type=int, default=[11, 12, 13, 14, 15])
    parser.add_argument("--collection", type=Path, default=Path("data/public/study"))
    parser.add_argument("--languages", nargs="*", default=["korquad_ko", "pquad_fa"])
    parser.add_argument("--split", default="dev")
    parser.add_argument("--values", type=Path)
    parser.add_argument("--sentence_transformers", nargs="*", type=Path, default=[])
    arguments = parser.parse_args()
    of = {language: passages(arguments.collection, language, arguments.split) for language in arguments.languages}
    pairs = [pair.split("-") for pair in arguments.pairs]
    found = {row: read(arguments.runs, row) for row in dict.fromkeys(name for pair in pairs for name in pair)}
    if "sentence_transformers" in found:
        found["sentence_transformers"] = read_lines(arguments.sentence_transformers, arguments.split)
    if arguments.values is not None:
        found = keep(arguments.values, found, of)
    lines = [compare(found, row, reference, arguments.seeds, of) for row, reference in pairs]
    print(f"| row | compared with | seeds | {' | '.join(of)} | average |\n|---|---|--:|" + "--:|" * (len(of) + 1))
    for line in lines:
        cells = [text(line["languages"].get(language)) for language in of]
        names = [line["row"], line["reference"], str(line["seeds"]), *cells, text(line.get("average"))]
        print("| " + " | ".join(names) + " |")
    what = f"{METRIC} on {arguments.split}: difference, and 95% of {DRAWS:,} bootstrap draws of seeds and passages with their queries"
    command = " ".join(["python configs/study/compare.py RUNS OUTPUT", *arguments.pairs])
    cosines = {row: similarities(arguments.runs, row) for row in dict.fromkeys(line["row"] for line in lines)}
    write_json(arguments.output, {"question": what, "command": command, "rows": lines, "similarities": cosines})


if __name__ == "__main__":
    sys.exit(main())
