"""How do time and memory of a search grow with the shards of a corpus, exact and approximate?

``python benchmarks/corpus_shards.py``

Random vectors around 2000 random centres, in shards on disk, as ``encode`` writes them. Each search is a process of its own. There
are centres, since embeddings of texts have topics. Around a centre the vectors spread in all dimensions alike, which is harder
than real embeddings: a hundred nearest of thousands that lie around one centre differ in nothing that lists or short codes keep.
The recall of a model is printed by ``evaluate --index approximate``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from clpl_moe.common.machine import peak_memory
from clpl_moe.retrieval.approximate import ApproximateIndex
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.retrieval.search import search
from clpl_moe.retrieval.store import SHARD_TEXTS, EmbeddingShards
from common import RESULTS, write_result

CENTRES, SPREAD = 2000, 0.7


def vectors(count: int, dimensions: int, seed: int) -> torch.Tensor:
    """(count, dimensions) float32 of length 1, around the same centres for every seed."""
    centres = torch.randn(CENTRES, dimensions, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    near = centres[torch.randint(CENTRES, (count,), generator=draw)]
    return F.normalize(near + SPREAD * torch.randn(count, dimensions, generator=draw), dim=-1)


def do_job(job: str, shards: EmbeddingShards, queries: int, k: int) -> None:
    """One search, printed as JSON."""
    torch.set_num_threads(1)
    asked = vectors(queries, shards.shape[1], 1)
    started = time.perf_counter()
    about = {}
    if job == "exact":
        search(asked, shards, k)
    else:
        index = ApproximateIndex(shards, EncodingArguments(index="approximate"))
        index.search(asked, k)
        about = index.about
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_memory("cpu"), "about": about}))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--passages", type=int, nargs="+", default=[2**16, 2**18, 2**20, 2**22, 10_000_000], help="ascending"
    )
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--top_k", type=int, default=100)
    parser.add_argument("--scratch", type=Path, help="folder for the embeddings; default: the system's")
    parser.add_argument("--job", choices=["exact", "approximate"], help="only this search, of what is in scratch")
    parser.add_argument("--output", type=Path, default=RESULTS / "corpus_shards.json")
    args = parser.parse_args()
    if args.job:
        shards = EmbeddingShards(args.scratch, args.passages[0], args.dimensions)
        return do_job(args.job, shards, args.queries, args.top_k)
    runs, rows = [], []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for passages in args.passages:
            shards = EmbeddingShards(Path(folder), passages, args.dimensions)
            for number in range(shards.count):
                if not shards.has(number):
                    rows_of_shard = vectors(SHARD_TEXTS, args.dimensions, number + 2)[: len(shards.rows(number))]
                    shards.write(number, rows_of_shard.half())
            (Path(folder) / "index.faiss").unlink(missing_ok=True)
            found = {}
            for job in ("exact", "approximate"):
                options = {"job": job, "passages": passages, "dimensions": args.dimensions, "scratch": folder}
                options |= {"queries": args.queries, "top_k": args.top_k}
                command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[job] = json.loads(done.stdout)
            runs.append({"passages": passages} | found)
            about = found["approximate"]["about"]
            seconds = about["seconds"]
            sampled = seconds["choice"] + seconds["exact"] * about["sample"] / about["queries"]
            rows.append(
                {
                    "passages": f"{passages:,}",
                    "exact s": round(found["exact"]["seconds"], 1),
                    "exact MiB": round(found["exact"]["peak_bytes"] / 2**20),
                    "index s": round(seconds["index"], 1),
                    "sample s": round(sampled, 1),
                    "approximate s": round(seconds["search"], 1),
                    "approximate MiB": round(found["approximate"]["peak_bytes"] / 2**20),
                    "lists": f"{about['lists_searched']:,} of {about['lists']:,}",
                    "candidates": f"{about['candidates']:,}",
                    "recall": round(about["recall"], 3),
                }
            )
            question = f"Search of {args.queries:,} queries, one thread: exact and approximate."
            model = f"random vectors of {args.dimensions} values, top {args.top_k}"
            settings = {"model": model, "precision": "float16", "threads": 1, "queries": args.queries}
            write_result(args.output, question, settings, rows, {"runs": runs})


if __name__ == "__main__":
    main()
