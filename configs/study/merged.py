"""Evaluate the models that `configs/study/mix.yaml` kept: as trained (where experts are given, with each of
them), with experts merged, and mixed with the base model.

    python configs/study/merged.py RUNS OUTPUT [--base models/small-encoder] [--rows ...] [--alphas 0.25 0.5 0.75]

Writes a JSON object a line: run, form, share of the tuned weights, and of each set the metrics; then the value of each query.
Runs whose line is there are not evaluated again. Passages are ranked within the joint corpus.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from clpl_moe.encoder import Encoder
from clpl_moe.encoder.encode import encode_tokenized, tokenize
from clpl_moe.evaluate.metrics import evaluate_run
from clpl_moe.merge.mix import Mixer
from clpl_moe.moe.inject import choose_expert, has_experts, merge_experts
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.search import search

METRICS = ("nDCG@5", "nDCG@10")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", default="models/small-encoder")
    parser.add_argument("--rows", nargs="*")
    parser.add_argument("--alphas", nargs="*", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--watch", action="store_true", help="go on with runs as they finish, until stopped")
    parser.add_argument("--language", default="all")
    parser.add_argument("--collection", type=Path, default=Path("data/public/study"))
    arguments = parser.parse_args()
    collection = Collection.load(arguments.collection, arguments.language, "dev")
    base = Encoder.load(arguments.base, compute_dtype=torch.bfloat16)
    # Once: it takes longer than to encode.
    tokenized = [
        tokenize(base, collection.queries, kind="query", max_length=64),
        tokenize(base, collection.passages, kind="passage", max_length=256),
    ]
    ids = collection.passage_ids
    done = set()
    if arguments.output.exists():
        lines = [json.loads(line) for line in arguments.output.open(encoding="utf-8")]
        done = {(line["run"], line["form"], line["alpha"]) for line in lines}

    def evaluate(encoder: Encoder, run: str, form: str, alpha: float) -> None:
        if (run, form, alpha) in done:
            return
        embeddings = [encode_tokenized(encoder, texts).to(encoder.device) for texts in tokenized]
        scores, places = search(*embeddings, 50)
        ranked = zip(collection.query_ids, places.tolist(), scores.tolist(), strict=True)
        found = {query: {ids[i]: score for i, score in zip(row, of, strict=True)} for query, row, of in ranked}
        sets: dict[str, dict[str, list[float]]] = {}
        for query, values in evaluate_run(collection.qrels, found, METRICS)[1].items():
            of_set = sets.setdefault(query.partition("/")[0], {name: [] for name in METRICS})
            for name in METRICS:
                of_set[name].append(values[name])
        means: dict[str, Any] = {name: {m: statistics.fmean(v) for m, v in of.items()} for name, of in sets.items()}
        line = {"run": run, "form": form, "alpha": alpha, "sets": means}
        line["queries"] = {name: [round(value, 4) for value in of["nDCG@5"]] for name, of in sets.items()}
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def try_run(folder: Path) -> None:
        if not (folder / "model" / "model.safetensors").is_file():
            return
        row = json.loads((folder / "run.json").read_text(encoding="utf-8"))["row"]
        if arguments.rows and row not in arguments.rows:
            return
        encoder = Encoder.load(folder / "model", compute_dtype=torch.bfloat16)
        with_experts = has_experts(encoder.model)
        if with_experts and encoder.model.config.moe["router"] == "given":
            for expert in range(encoder.model.config.moe["num_experts"]):
                choose_expert(encoder, expert)
                evaluate(encoder, folder.name, f"expert {expert}", 1.0)
        else:
            evaluate(encoder, folder.name, "trained", 1.0)
        if with_experts:
            merge_experts(encoder)
            evaluate(encoder, folder.name, "merged", 1.0)
        mixer = Mixer(encoder, base)
        for alpha in arguments.alphas:
            mixer.mix(alpha)
            evaluate(encoder, folder.name, "merged" if with_experts else "trained", alpha)

    evaluate(base, "base", "base", 0.0)
    seen: set[Path] = set()
    while True:
        new = [path.parent for path in sorted(arguments.runs.glob("runs/*/run.json")) if path.parent not in seen]
        seen.update(new)
        for folder in new:
            try_run(folder)
        if not arguments.watch:
            break
        time.sleep(2)


if __name__ == "__main__":
    main()
