"""Make the collections of the study: for each set train, dev, and a part that is set aside as `test`.

    python configs/study/prepare_sets.py DATA OUTPUT

DATA holds files in SQuAD's shape (`NAME.json`) and folders in BEIR's layout. Articles (and their paragraphs) go to one side as
a whole. Of SQuAD's shape, dev is what `prepare` makes with its defaults (a fifth of the articles), test are the next 15% in the
same order, train is the rest. Of BEIR's layout with a dev split, test is the third of its queries that a hash of their article
chooses; with train alone, documents are divided as articles are. The collection `all` has every set's passages and dev and test
queries, for models that are trained on several sets; ids begin with the set's name.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from clpl_moe.common.files import write_jsonl
from clpl_moe.common.output import atomic_dir
from clpl_moe.prepare.articles import make_collection
from clpl_moe.prepare.source import Split
from clpl_moe.prepare.sources.beir import Beir
from clpl_moe.prepare.sources.squad import read_squad

SQUAD = ("korquad_ko", "pquad_fa", "parsinlu_fa", "xquad_hi", "mmqa_hi", "hiquad_hi")
BEIR = ("ko_miracl", "fa_miracl", "hi_miracl")
TRAIN_ONLY = ("ko_welfare",)
DEV, TEST = 0.2, 0.15
MOST = 500  # queries of dev and of test, where questions were written by a model


def draw(*names: object) -> float:
    """A number from 0 to 1 that depends on the names only."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, names)).encode()).digest()[:8], "big") / 2**64


def from_squad(path: Path) -> tuple[list[dict[str, Any]], dict[str, Split]]:
    articles = read_squad(path)
    few = make_collection(articles, DEV, with_titles=False)
    many = make_collection(articles, DEV + TEST, with_titles=False)
    dev = {line["id"] for line in few.corpus if line["split"] == "dev"}
    corpus = [
        line if line["split"] == "train" or line["id"] in dev else line | {"split": "test"} for line in many.corpus
    ]
    side = {line["id"]: line["split"] for line in corpus}
    return corpus, {"train": many.splits["train"]} | {
        name: part(many.splits["dev"], side, name) for name in ("dev", "test")
    }


def part(split: Split, side: dict[str, str], name: str) -> Split:
    """The queries whose passages are all of one side."""
    sides: dict[str, set[str]] = {}
    for query, passage in split.judgements:
        sides.setdefault(query, set()).add(side[passage])
    queries = {query: text for query, text in split.queries.items() if sides.get(query) == {name}}
    return Split(queries, {pair: grade for pair, grade in split.judgements.items() if pair[0] in queries})


def from_beir(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Split]]:
    source = Beir(str(folder))
    splits = source.read_splits()
    corpus, article = [], {}
    for passage in source.read_passages():
        corpus.append({"id": passage.id, "title": passage.title, "text": passage.text})
        article[passage.id] = passage.title or passage.id.rpartition("#")[0] or passage.id.rpartition("-")[0]
    side = {p: "test" if draw(folder.name, article[p]) < 1 / 3 else "dev" for p in article}
    first = {}  # a query goes with its first positive
    for (query, passage), grade in splits["dev"].judgements.items():
        if grade > 0:
            first.setdefault(query, side[passage])
    found = {"train": splits["train"]}
    for name in ("dev", "test"):
        queries = {q: text for q, text in splits["dev"].queries.items() if first.get(q) == name}
        found[name] = Split(queries, {p: g for p, g in splits["dev"].judgements.items() if p[0] in queries})
    return corpus, found


def from_train(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Split]]:
    source = Beir(str(folder))
    whole = source.read_splits()["train"]
    corpus = []
    for passage in source.read_passages():
        place = draw(folder.name, passage.title or passage.id)
        side = "dev" if place < DEV else "test" if place < DEV + TEST else "train"
        corpus.append({"id": passage.id, "title": "", "text": passage.text, "split": side})
    side = {line["id"]: line["split"] for line in corpus}
    found = {name: part(whole, side, name) for name in ("train", "dev", "test")}
    for name in ("dev", "test"):
        kept = sorted(found[name].queries, key=lambda query: draw(folder.name, query))[:MOST]
        queries = {query: found[name].queries[query] for query in kept}
        found[name] = Split(queries, {p: g for p, g in found[name].judgements.items() if p[0] in queries})
    return corpus, found


def write(folder: Path, corpus: list[dict[str, Any]], splits: dict[str, Split]) -> None:
    known: dict[str, list[str]] = {}
    if "train" in splits:
        for (query, passage), grade in splits["train"].judgements.items():
            if grade > 0:
                known.setdefault(passage, []).append(splits["train"].queries[query])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(folder) as temporary:
        write_jsonl(temporary / "corpus.jsonl", corpus)
        for name, split in splits.items():
            split.write(temporary, name)
        if known:
            lines = ({"docid": passage, "queries": queries} for passage, queries in known.items())
            write_jsonl(temporary / "positive_queries.jsonl", lines)


def main(data: Path, output: Path) -> None:
    corpora: list[dict[str, Any]] = []
    joined = {"dev": Split({}, {}), "test": Split({}, {})}
    for name in (*SQUAD, *BEIR, *TRAIN_ONLY):
        if name in SQUAD:
            corpus, splits = from_squad(data / f"{name}.json")
        else:
            corpus, splits = (from_beir if name in BEIR else from_train)(data / name)
        write(output / name, corpus, splits)
        corpora += [line | {"id": f"{name}/{line['id']}"} for line in corpus]
        for side, split in joined.items():
            split.queries.update({f"{name}/{q}": text for q, text in splits[side].queries.items()})
            judged = splits[side].judgements.items()
            split.judgements.update({(f"{name}/{q}", f"{name}/{p}"): grade for (q, p), grade in judged})
        sizes = ", ".join(f"{len(split.queries):,} {side}" for side, split in splits.items())
        print(f"{name}: {len(corpus):,} passages; queries: {sizes}")
    write(output / "all", corpora, joined)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
