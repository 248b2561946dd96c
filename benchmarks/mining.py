"""How do time and memory of mining grow with the corpus, and what does a kill cost?

``python benchmarks/mining.py [--model models/small-encoder]``

Synthetic text; without a model folder an encoder of one layer with random weights. Each run is ``python -m clpl_moe.mine`` in a
process of its own. The largest corpus is mined a second time and killed (SIGKILL) on the way: in the encoding, and in the
search. The training file has to be the same to the byte, and no shard of embeddings may be made twice.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from clpl_moe.retrieval.store import SHARD_TEXTS
from common import RESULTS, write_result
from corpus import (
    KILLS,
    LANGUAGE,
    LONGEST,
    add_options,
    describe,
    growth,
    kill_and_finish,
    killed_row,
    make_collection,
    make_model,
    run_command,
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(parser, [25_000, 50_000, 100_000], 2000)
    parser.add_argument("--output", type=Path, default=RESULTS / "mining.json")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        scratch = Path(name)
        model = args.model or make_model(scratch / "model", layers=args.layers, width=args.width)
        for passages in args.passages:
            collection = make_collection(scratch / "collection", passages, args.queries, split="train")
            command = ["clpl_moe.mine", "--model", str(model), "--collection", str(collection)]
            command += [
                "--language",
                LANGUAGE,
                "--query_max_len",
                str(LONGEST),
                "--passage_max_len",
                str(LONGEST),
            ]
            # With random weights all passages are nearly as similar as the positive.
            command += ["--max_positive_ratio", "0", "--cache_dir"]
            run = run_command([*command, str(scratch / "embeddings"), "--output", str(scratch / "train.jsonl")])
            done = (scratch / "train.jsonl").read_bytes()
            (scratch / "train.jsonl").unlink()
            stored = sum(path.stat().st_size for path in (scratch / "embeddings").glob("*/*.npy"))
            shutil.rmtree(scratch / "embeddings", ignore_errors=True)
            runs.append({"passages": passages} | {key: run[key] for key in ("seconds", "peak_bytes")})
            runs[-1] |= {"embedding_bytes": stored, "lines": done.count(b"\n")}
            print(f"{passages:,} passages: {run['seconds']:.1f} s, {run['peak_bytes'] / 2**20:.0f} MiB", flush=True)
        shards = -(-passages // SHARD_TEXTS)
        again = [*command, str(scratch / "killed"), "--output", str(scratch / "again.jsonl")]
        killed = kill_and_finish(again, scratch / "killed", shards)
        if (scratch / "again.jsonl").read_bytes() != done:
            raise RuntimeError("the run that was killed has another result")
    rows = [
        {
            "passages": f"{run['passages']:,}",
            "seconds": round(run["seconds"], 1),
            "peak MiB": round(run["peak_bytes"] / 2**20),
            "embeddings MiB": round(run["embedding_bytes"] / 2**20, 1),
        }
        for run in runs
    ]
    rows.append(killed_row(rows[-1], killed))
    settings = describe(args) | {"precision": "auto"}
    measurements = {
        "runs": runs,
        "peak_bytes_per_passage": growth(runs),
        "embedding_bytes_per_passage": runs[-1]["embedding_bytes"] / passages,
        "killed": killed | {"kills": KILLS, "shards": shards, "same_output": True, "encoded_twice": 0},
    }
    question = "Mining of a corpus, embeddings in shards on disk; killed on the way, it gives the same bytes."
    write_result(args.output, question, settings, rows, measurements)


if __name__ == "__main__":
    main()
