"""Encoding a corpus: ours beside sentence-transformers' and FlagEmbedding's, dense embeddings only.

``python benchmarks/encoding.py --model FOLDER [--pooling cls] [--texts FILE.jsonl] [--limit 300]``

The three take turns in one process, with the same weights, texts, longest input and precision: bfloat16 where the hardware is
fast at it, else float32. FlagEmbedding has bfloat16 on GPUs only; on a CPU it stays in float32. Each gets the best of several
batch sizes, each tried out twice beforehand: tokens for ours, for the others the number of texts with that many tokens on
average. Their embeddings have to agree. On a CPU freed buffers are kept, as this package's commands do it: for all three.

The share of what the hardware's matrix product would allow is of the operations that unpadded texts need, the whole last layer
included, of which ours leaves most out with CLS pooling.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from clpl_moe.common.allocator import keep_freed_memory
from clpl_moe.encoder import Encoder
from clpl_moe.encoder.settings import EmbeddingSettings
from common import (
    DTYPES,
    RESULTS,
    alternate,
    encoder_flops,
    matmul_rate,
    pick_device,
    pick_precision,
    summary,
    write_result,
)

ROOT = Path(__file__).parents[1]
Encode = Callable[[list[str], int], np.ndarray]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="an XLM-R, RoBERTa or BERT model folder")
    parser.add_argument("--pooling", choices=["cls", "mean"], help="instead of the folder's; figures only")
    parser.add_argument("--texts", type=Path, help="JSONL with a field text; default: the samples' corpora")
    parser.add_argument("--limit", type=int, default=300, help="take so many texts, evenly spread over the file")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--budgets", type=int, nargs="+", help="tokens a batch to try")
    parser.add_argument("--precision", choices=["auto", *DTYPES], default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "encoding.json")
    args = parser.parse_args()
    device = pick_device("auto")
    cuda = device == "cuda"
    if not cuda:
        keep_freed_memory()
    precision = pick_precision(args.precision, device)
    budgets = args.budgets or ([16384, 65536] if cuda else [1024, 2048, 4096])
    texts = load_texts(args.texts, args.limit)
    with tempfile.TemporaryDirectory() as folder:
        encoder = Encoder.load(args.model, device="cpu")
        config, tokenizer = encoder.model.config.to_dict(), encoder.tokenizer
        pooling = args.pooling or encoder.settings.pooling
        # Without prompts, which the others would each have to be told in another way.
        Encoder(encoder.model, tokenizer, EmbeddingSettings(pooling=pooling), args.max_length).save(folder)
        encoders = make_encoders(folder, pooling, args.max_length, device, precision)
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=args.max_length)["input_ids"]]
    mean_length = sum(lengths) / len(lengths)

    def run(name: str, budget: int) -> tuple[np.ndarray, float, float]:
        # clpl_moe counts tokens, the others texts.
        size = budget if name == "clpl_moe" else max(1, round(budget / mean_length))
        wall, cpu = time.perf_counter(), time.process_time()
        embeddings = encoders[name](texts, size)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"{name}, {budget} tokens a batch: {wall:.2f} s, {cpu:.2f} s of CPU", flush=True)
        return embeddings, wall, cpu

    best = {}
    for name in encoders:
        run(name, budgets[0])  # warm
        tries = alternate({budget: partial(run, name, budget) for budget in budgets}, 2 if len(budgets) > 1 else 1)
        best[name] = min(budgets, key=lambda budget, tries=tries: min(t[1 if cuda else 2] for t in tries[budget]))
    size = 8192 if cuda else 2048
    rates = {"before": matmul_rate(torch.device(device), DTYPES[precision], size, 5)}
    results = alternate({name: partial(run, name, best[name]) for name in encoders}, args.rounds)
    embeddings = {name: rounds[0][0] for name, rounds in results.items()}
    agreement = {name: float((embeddings[name] * embeddings["clpl_moe"]).sum(1).min()) for name in encoders}
    assert min(agreement.values()) > (0.9999 if precision == "fp32" else 0.99), agreement
    rates["after"] = matmul_rate(torch.device(device), DTYPES[precision], size, 5)
    work = sum(encoder_flops(config, lengths))
    rows, measurements = [], {"matmul_gflops": {when: round(rate / 1e9) for when, rate in rates.items()}}
    for name, rounds in results.items():
        wall, cpu = (summary([values[i] for values in rounds]) for i in (1, 2))
        measurements[name] = {"batch_tokens": best[name], "seconds": wall, "cpu_seconds": cpu}
        measurements[name]["lowest_cosine"] = agreement[name]
        ours = measurements["clpl_moe"]
        rows.append(
            {
                "encoder": name,
                "texts/s": round(len(texts) / wall["median"], 2),
                "spread": round(wall["spread"], 3),
                "ours is faster by": round(wall["median"] / ours["seconds"]["median"], 3),
                # The steadier one where other work shares the cores.
                "in processor time": round(cpu["median"] / ours["cpu_seconds"]["median"], 3),
                "share of matmul": round(work / wall["median"] / max(rates.values()), 2),
            }
        )
        print(rows[-1])
    settings = {
        "model": Path(args.model).name,
        "pooling": pooling,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "texts": len(texts),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "shortest": min(lengths),
        "rounds": args.rounds,
    }
    question = "Encoding a corpus, dense embeddings, each encoder at its best batch size: medians over rounds."
    write_result(args.output, question, settings, rows, measurements)


def load_texts(path: Path | None, limit: int) -> list[str]:
    """Different texts, in no order of length."""
    paths = [path] if path else sorted((ROOT / "data" / "samples").glob("*/corpus.jsonl"))
    lines = (json.loads(line) for p in paths for line in p.read_text(encoding="utf-8").splitlines())
    texts = list(dict.fromkeys(line["text"] for line in lines))
    return texts[:: max(1, len(texts) // limit)][:limit]


def make_encoders(folder: str, pooling: str, max_length: int, device: str, precision: str) -> dict[str, Encode]:
    """Name -> function of texts and batch size (tokens for ours, texts for the others)."""
    from FlagEmbedding import BGEM3FlagModel
    from sentence_transformers import SentenceTransformer

    dtype = DTYPES[precision]
    encoder = Encoder.load(folder, dtype=dtype, compute_dtype=dtype, device=device)
    peer = SentenceTransformer(folder, device=device, model_kwargs={"dtype": dtype})
    halves = {f"use_{name}": precision == name for name in ("fp16", "bf16")}
    flag = BGEM3FlagModel(folder, devices=[device], pooling_method=pooling, **halves)

    def ours(texts: list[str], size: int) -> np.ndarray:
        return encoder.encode_passages(texts, max_length=max_length, batch_tokens=size, progress=False).numpy()

    def sentence_transformers(texts: list[str], size: int) -> np.ndarray:
        return peer.encode(texts, batch_size=size, normalize_embeddings=True, show_progress_bar=False)

    def flag_embedding(texts: list[str], size: int) -> np.ndarray:
        return flag.encode(texts, batch_size=size, max_length=max_length, return_dense=True)["dense_vecs"]

    return {"clpl_moe": ours, "SentenceTransformer": sentence_transformers, "BGEM3FlagModel": flag_embedding}


if __name__ == "__main__":
    main()
