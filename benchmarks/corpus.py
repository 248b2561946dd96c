"""How do time and memory of an evaluation grow with the corpus, and what does a kill cost?

``python benchmarks/corpus.py``

Synthetic text and an encoder of one layer with random weights, so that the way of the data is measured rather than the
model. Each run is ``python -m clpl_moe.evaluate`` in a process of its own. The largest corpus is evaluated a second time and
killed (SIGKILL) on the way: in the encoding, and in the search. Metrics and run file have to be the same to the byte, and no
shard of embeddings may be made twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from clpl_moe.common.files import write_jsonl
from clpl_moe.encoder import save_encoder
from clpl_moe.encoder.settings import EmbeddingSettings
from common import RESULTS, write_result

LANGUAGE = "synthetic"
LONGEST = 64  # tokens of a passage
KILLS = 3


def make_words(count: int, seed: int) -> list[str]:
    """Different made-up words of two to four syllables."""
    draw = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(draw.choices(syllables, k=draw.randint(2, 4)))] = None
    return list(words)


def make_collection(
    folder: Path, passages: int, queries: int, *, split: str = "dev", words: int = 20000, seed: int = 0
) -> Path:
    """A collection of random passages, of 8 to 40 words as frequent as in a natural text, and queries of six words out of
    a passage each. A larger one begins with the same passages."""
    vocabulary = make_words(words, seed)
    # The rarer, the later: the n-th word is as frequent as 1/n (Zipf).
    cumulative = torch.arange(1, words + 1, dtype=torch.float64).reciprocal().cumsum(0).tolist()
    asked = set(random.Random(seed).sample(range(passages), queries))
    found: list[tuple[int, str]] = []

    def lines():
        draw = random.Random(seed + 1)
        for number in range(passages):
            text = draw.choices(vocabulary, cum_weights=cumulative, k=draw.randint(8, 40))
            if number in asked:
                found.append((number, " ".join(random.Random(number).sample(text, 6))))
            yield {"id": f"p{number}", "title": " ".join(text[:2]), "text": " ".join(text[2:])}

    write_jsonl(folder / LANGUAGE / "corpus.jsonl", lines())
    write_jsonl(folder / LANGUAGE / f"{split}_queries.jsonl", ({"id": f"q{n}", "text": text} for n, text in found))
    judged = ({"qid": f"q{n}", "docid": f"p{n}", "relevance": 1} for n, _ in found)
    write_jsonl(folder / LANGUAGE / f"{split}_qrels.jsonl", judged)
    return folder


def make_model(folder: Path, *, layers: int, width: int, words: int = 20000, seed: int = 0) -> Path:
    """A folder of an XLM-R with random weights, and a tokenizer of the words of :func:`make_collection`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: number for number, word in enumerate([*special, *make_words(words, seed)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    tokens = dict(zip(names, special)) | {"cls_token": "<s>", "sep_token": "</s>"}
    config = XLMRobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=2 * width,
        max_position_embeddings=LONGEST + 2,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LONGEST, **tokens)
    # The mean of its words' vectors says what a text is about, also where the weights are random.
    save_encoder(XLMRobertaModel(config), fast, folder, EmbeddingSettings(pooling="mean"), max_length=LONGEST)
    return folder


def run_command(command: Sequence[str], stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run a command of this package in a process of its own, and kill it once ``stop`` says so.

    Returns:
        ``seconds``; ``peak_bytes``, the most that was resident; ``output``, what it printed; ``killed``.

    Raises:
        RuntimeError: it failed.
    """
    started = time.perf_counter()
    peak, killed = 0, False
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=output, stderr=errors)
        # Its own record of the peak: what the system tells of a child that ended counts its parent in.
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            if match := re.search(r"VmHWM:\s+(\d+)", status.read_text()):
                peak = max(peak, int(match[1]) * 1024)
            if stop():
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                killed = True
            time.sleep(0.02)
        output.seek(0)
        errors.seek(0)
        if process.returncode and not killed:
            raise RuntimeError(f"{command[0]} ended with code {process.returncode}:\n{errors.read()[-3000:]}")
        return {
            "seconds": time.perf_counter() - started,
            "peak_bytes": peak,
            "output": output.read(),
            "killed": killed,
        }


def shards_in(folder: Path) -> dict[str, int]:
    """The files of embeddings in a folder of embeddings, and when each was made."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*/*.npy")}


def kill_and_finish(command: Sequence[str], embeddings: Path, shards: int) -> dict[str, Any]:
    """Run a command, kill it :data:`KILLS` times, and let it finish.

    The kills are spread over the encoding, the last one when all shards are there: in the search.

    Returns:
        ``seconds`` and ``peak_bytes`` of all runs; ``found``, the number of shards that each run but the first one found.

    Raises:
        RuntimeError: it ended before it could be killed, or a run did not find what the one before had made.
    """
    seconds, peak, found = 0.0, 0, []
    for number in range(1, KILLS + 1):
        before = shards_in(embeddings)
        run = run_command(command, lambda n=number: len(shards_in(embeddings)) >= n * shards // KILLS)
        after = shards_in(embeddings)
        if not run["killed"]:
            raise RuntimeError(f"{command[0]} ended before it could be killed, with {len(after)} of {shards} shards")
        if any(after.get(name) != made for name, made in before.items()):
            raise RuntimeError("embeddings that were there have been made again")
        seconds, peak = seconds + run["seconds"], max(peak, run["peak_bytes"])
        print(f"killed after {run['seconds']:.1f} s with {len(after)} of {shards} shards", flush=True)
        found.append(len(after))
    run = run_command(command)
    said = re.search(r"([\d,]+) of [\d,]+ shards found", run["output"])
    if said is None or int(said[1].replace(",", "")) != found[-1]:
        raise RuntimeError(f"the last run should have found {found[-1]} shards; it printed:\n{run['output']}")
    return {
        "seconds": seconds + run["seconds"],
        "peak_bytes": max(peak, run["peak_bytes"]),
        "found": found,
    }


def add_options(parser: argparse.ArgumentParser, sizes: list[int], queries: int) -> None:
    """What the benchmarks on synthetic text are asked."""
    parser.add_argument("--model", type=Path, help="model folder; default: random weights of the shape below")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--passages", type=int, nargs="+", default=sizes, help="sizes of the corpus, ascending")
    parser.add_argument("--queries", type=int, default=queries)
    parser.add_argument("--scratch", type=Path, help="folder for corpus and embeddings; default: the system's")


def growth(rows: Sequence[dict[str, Any]]) -> float | None:
    """Bytes of peak memory that a passage more takes, from the smallest corpus to the largest."""
    first, last = rows[0], rows[-1]
    if first["passages"] == last["passages"]:
        return None
    return (last["peak_bytes"] - first["peak_bytes"]) / (last["passages"] - first["passages"])


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say of a run, for the result file."""
    return {
        "model": args.model.name if args.model else f"XLM-R, {args.layers} layer(s) of width {args.width}",
        "threads": torch.get_num_threads(),
        "queries": args.queries,
    }


def killed_row(row: dict[str, Any], killed: dict[str, Any]) -> dict[str, Any]:
    """The table's last row: the largest corpus again, whose row is ``row``, with kills on the way."""
    return row | {
        "passages": f"{row['passages']}, killed {KILLS} times",
        "seconds": round(killed["seconds"], 1),
        "peak MiB": round(killed["peak_bytes"] / 2**20),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(parser, [125_000, 500_000], 500)
    parser.add_argument("--output", type=Path, default=RESULTS / "corpus.json")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        scratch = Path(name)
        model = args.model or make_model(scratch / "model", layers=args.layers, width=args.width)
        for passages in args.passages:
            collection = make_collection(scratch / "collection", passages, args.queries)
            command = ["clpl_moe.evaluate", "--model", str(model), "--collection", str(collection)]
            command += [
                "--languages",
                LANGUAGE,
                "--query_max_len",
                str(LONGEST),
                "--passage_max_len",
                str(LONGEST),
                "--output",
            ]
            run = run_command([*command, str(scratch / "out")])
            done = read_output(scratch / "out")
            content = json.loads((scratch / "out" / LANGUAGE / "metrics.json").read_text())
            runs.append({"passages": passages} | {key: run[key] for key in ("seconds", "peak_bytes")})
            runs[-1] |= {key: content[key] for key in ("passages_per_second", "metrics")} | {
                "steps": content["seconds"]
            }
            print(f"{passages:,} passages: {run['seconds']:.1f} s, {run['peak_bytes'] / 2**20:.0f} MiB", flush=True)
            if passages < args.passages[-1]:
                shutil.rmtree(scratch / "out")
        from clpl_moe.retrieval.store import SHARD_TEXTS

        shards = -(-passages // SHARD_TEXTS)
        killed = kill_and_finish(
            [*command, str(scratch / "killed")], scratch / "killed" / LANGUAGE / ".embeddings", shards
        )
        if read_output(scratch / "killed") != done:
            raise RuntimeError("the run that was killed has another result")
    rows = [
        {
            "passages": f"{run['passages']:,}",
            "seconds": round(run["seconds"], 1),
            "encoded/s": round(run["passages_per_second"]),
            "search s": round(run["steps"]["search"], 1),
            "peak MiB": round(run["peak_bytes"] / 2**20),
        }
        for run in runs
    ]
    rows.append(killed_row(rows[-1], killed) | {"encoded/s": "–", "search s": "–"})
    settings = describe(args) | {
        "precision": content["settings"]["dtype"],
        "top_k": content["settings"]["top_k"],
    }
    measurements = {
        "runs": runs,
        "peak_bytes_per_passage": growth(runs),
        "killed": killed | {"kills": KILLS, "shards": shards, "same_output": True, "encoded_twice": 0},
    }
    question = "Evaluation of a corpus, embeddings in shards on disk; killed on the way, it gives the same bytes."
    write_result(args.output, question, settings, rows, measurements)


def read_output(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """The run file, and everything of ``metrics.json`` but the times."""
    content = json.loads((folder / LANGUAGE / "metrics.json").read_text())
    del content["seconds"], content["passages_per_second"]
    return (folder / LANGUAGE / "run.trec").read_bytes(), content


if __name__ == "__main__":
    main()
