"""Small collections, and the evaluation command on them."""

import csv

import torch

from clpl_moe.common.files import write_jsonl
from clpl_moe.encoder import load_encoder
from clpl_moe.evaluate.__main__ import main

TEXTS = [f"{a} {b}" for a in ("red", "blue", "green", "white") for b in ("house", "river", "stone", "cloud", "bird")]


def make_collection(folder, language, copies=0):
    """Queries are passages with a letter more; some passages are there several times (ties)."""
    texts = TEXTS + TEXTS[:1] * copies
    folder = folder / language
    write_jsonl(folder / "corpus.jsonl", ({"id": f"p{i}", "text": text} for i, text in enumerate(texts)))
    write_jsonl(folder / "dev_queries.jsonl", ({"id": f"q{i}", "text": f"{TEXTS[i]}s"} for i in range(8)))
    write_jsonl(folder / "dev_qrels.jsonl", ({"qid": f"q{i}", "docid": f"p{i}", "relevance": 1} for i in range(8)))
    return folder.parent


def make_collections(folder):
    """Two languages; the second one has ties."""
    make_collection(folder, "ko")
    return make_collection(folder, "fa", copies=3)


def run(models, collections, output, languages=("ko",), **options):
    models = models if isinstance(models, list) else [models]
    argv = ["--model", *map(str, models), "--languages", *languages]
    options = {
        "collection": collections,
        "output": output,
        "passage_max_len": 100,
        "dtype": "float32",
    } | options
    main(argv + [f"--{key}={value}" for key, value in options.items()])


def table(printed):
    """The words of each line of the table of results."""
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:1] == ["model"])
    return [line.split() for line in lines[start : lines.index("", start)]]


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def changed_copy(model, folder):
    model, tokenizer = load_encoder(model)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
