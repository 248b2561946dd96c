"""How many mined negatives are false, by what ``mine`` leaves out: copies in other bytes, several positives, a guide.

``python benchmarks/false_negatives_rules.py --squad korquad.json --languages ko``
``python benchmarks/false_negatives_rules.py --beir ko_miracl --languages ko --output benchmarks/results/several_positives.json``

Two measurements, on subsets that one core embeds in minutes:

1. Questions of a file in SQuAD's shape. Each passage that answers one is in the corpus a second time, in the bytes that another
   source would have (``other_bytes``). A negative is a copy, if it is such a passage of the question's own; it holds the answer,
   if it is another passage with the answer's string in it (see false_negatives.py for what that tells). Guides are stand-ins
   for a better encoder: BM25 of pieces of words, ``--guide``, and one that knows the answers, which shows what a perfect one costs.
2. Queries of a folder in BEIR's layout with three positives or more. Each positive in turn is taken out of the judgements:
   mined as a negative, it is false. Queries with two positives or more, all known, tell how many negatives a rule leaves, and
   how hard they are. "Centred" are cosines without the passages' mean, which spread as those of other encoders than E5 do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from clpl_moe.common.files import read_jsonl, write_json, write_jsonl
from clpl_moe.common.text_key import text_key
from clpl_moe.encoder import Encoder
from clpl_moe.mine import filters
from clpl_moe.mine import index as mine_index
from clpl_moe.mine.guide import Guide
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.options import SelectionArguments
from clpl_moe.mine.rank import MiningQuery, Ranking
from clpl_moe.mine.select import NegativeMiner
from clpl_moe.prepare.__main__ import main as prepare
from clpl_moe.retrieval.collection import Collection, normalize_text
from clpl_moe.retrieval.options import EncodingArguments, open_encoder
from clpl_moe.retrieval.store import encode_passages, encode_queries
from common import benchmark_parser, pick_device, write_result
from false_negatives import read_answers

_RANK_TO = SelectionArguments.rank_to
_LIMITS = (0.95, 0.98)  # of the positive's score: mine's default, and what trains E5 better
Embed = Callable[[str, Sequence[str]], torch.Tensor]  # "query" or "passage", n texts: (n, D)


def old_key(text: str) -> str:
    """The form in which texts were compared up to version 0.2: without case, punctuation, and invisible characters."""
    kinds = ((c, unicodedata.category(c)) for c in unicodedata.normalize("NFC", text).casefold())
    return " ".join("".join(" " if kind[0] == "P" else c for c, kind in kinds if kind != "Cf").split())


@contextlib.contextmanager
def compared_as_before() -> Iterator[None]:
    """In the block, ``mine`` compares by :func:`old_key`."""

    def text_id(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(old_key(text).encode(), digest_size=8).digest(), "big") >> 1

    kept = mine_index.text_id, mine_index._ID_OF_EMPTY, mine_index.text_key, filters.text_key
    mine_index.text_id, mine_index._ID_OF_EMPTY = text_id, text_id("")
    mine_index.text_key = filters.text_key = old_key
    try:
        yield
    finally:
        mine_index.text_id, mine_index._ID_OF_EMPTY, mine_index.text_key, filters.text_key = kept


def other_bytes(text: str) -> str:
    """A text in the bytes that another source has: letters in parts, line breaks, and what Persian and Hindi add to that."""
    parts = {"ی": "ي", "ک": "ك", "\u200c": " ", "\u0640": ""}
    digits = {digit: str(unicodedata.digit(digit)) for digit in "۰۱۲۳۴۵۶۷۸۹०१२३४५६७८९"}
    return unicodedata.normalize("NFD", text).translate(str.maketrans(parts | digits)).replace(". ", ".\n")


class BM25Guide:
    """BM25 of three characters: another judge than an encoder, and a weak one."""

    def __init__(self, k1: float = 1.2, b: float = 0.75) -> None:
        self._k1, self._b = k1, b

    def read(self, queries: Sequence[MiningQuery], index: PassageIndex, places: Iterator[int]) -> None:
        self._queries = [set(_grams(query.text)) for query in queries]
        self._passages = [Counter(_grams(text)) for text in index.texts]
        frequency = Counter(gram for grams in self._passages for gram in grams)
        number = len(self._passages)
        self._weights = {gram: math.log(1 + (number - n + 0.5) / (n + 0.5)) for gram, n in frequency.items()}
        self._lengths = [grams.total() for grams in self._passages]
        self._mean = sum(self._lengths) / number

    def scores(self, row: int, places: Sequence[int]) -> list[float]:
        found = []
        for place in places:
            grams = self._passages[place]
            norm = self._k1 * (1 - self._b + self._b * self._lengths[place] / self._mean)
            hits = self._queries[row] & grams.keys()
            found.append(sum(self._weights[g] * grams[g] * (self._k1 + 1) / (grams[g] + norm) for g in hits))
        return found


def _grams(text: str) -> list[str]:
    text = f" {text_key(text)} "
    return [text[i : i + 3] for i in range(len(text) - 2)]


class KnowingGuide:
    """Knows which passages hold the answer."""

    def __init__(self, holds: Callable[[int, MiningQuery], bool]) -> None:
        self._holds = holds

    def read(self, queries: Sequence[MiningQuery], index: PassageIndex, places: Iterator[int]) -> None:
        self._queries = queries

    def scores(self, row: int, places: Sequence[int]) -> list[float]:
        query = self._queries[row]
        return [0.5 if p in query.positives else float(self._holds(p, query)) for p in places]


def rank(queries: Sequence[MiningQuery], index: PassageIndex, embed: Embed) -> Ranking:
    """All passages by their cosine to each query, ``_RANK_TO`` and some."""
    passages = embed("passage", list(index.texts))
    scores = embed("query", [query.text for query in queries]) @ passages.T
    depth = min(len(index), _RANK_TO + max(len(query.excluded) for query in queries))
    best = scores.topk(depth)
    return Ranking(best.values, best.indices, [scores[i, q.positives].tolist() for i, q in enumerate(queries)])


def mining_queries(collection: Collection, index: PassageIndex) -> list[MiningQuery]:
    """The queries with a positive in the corpus."""
    queries = []
    for query_id, text in zip(collection.query_ids, collection.queries):
        if relevant := index.relevant(collection.qrels.get(query_id, {})):
            queries.append(MiningQuery(query_id, text, relevant, set(index.answering(text))))
    return queries


def with_copies(squad: Path, language: str, work: Path, passages: int, questions: int) -> Collection:
    """A collection of the first passages and some of their questions, each passage also in other bytes."""
    articles: list[dict[str, Any]] = []
    number = 0
    for article in json.loads(squad.read_text(encoding="utf-8"))["data"]:
        kept = [p | {"qas": [q for q in p["qas"] if q.get("answers")]} for p in article["paragraphs"]]
        kept = kept[: passages - number]
        number += len(kept)
        articles.append(article | {"paragraphs": kept})
    ids = [q["id"] for a in articles for p in a["paragraphs"] for q in p["qas"]]
    chosen = set(random.Random(0).sample(ids, min(questions, len(ids))))
    for article in articles:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [q for q in paragraph["qas"] if q["id"] in chosen]
    write_json(work / f"{language}.json", {"data": [a for a in articles if a["paragraphs"]]})
    options = ["--titles", "false", "--dev_share", "0", "--overwrite", "true"]
    prepare(["--squad", str(work / f"{language}.json"), "--language", language, "--output", str(work), *options])
    corpus = [record for _, record in read_jsonl(work / language / "corpus.jsonl")]
    copies = [r | {"id": f"copy-{r['id']}", "text": other_bytes(r["text"])} for r in corpus]
    write_jsonl(work / language / "corpus.jsonl", corpus + copies)
    return Collection.load(work, language, "train")


def cut(source: Path, folder: Path, passages: int, others: int = 60) -> Path:
    """A folder in BEIR's layout with the train queries of several positives, some others, their judged passages and random ones."""
    judgements = (source / "qrels" / "train.tsv").read_text(encoding="utf-8").splitlines()
    judged: dict[str, dict[str, float]] = {}
    for line in judgements[1:]:
        query, passage, grade = line.split("\t")
        judged.setdefault(query, {})[passage] = float(grade)
    positives = {query: sum(grade > 0 for grade in grades.values()) for query, grades in judged.items()}
    draw = random.Random(0)
    single = [query for query, number in positives.items() if number == 1]
    chosen = {query for query, number in positives.items() if number > 1} | set(
        draw.sample(single, min(len(single), others))
    )
    kept = {passage for query in chosen for passage in judged[query]}
    corpus = [record for _, record in read_jsonl(source / "corpus.jsonl")]
    rest = [record["_id"] for record in corpus if record["_id"] not in kept]
    kept |= set(draw.sample(rest, max(0, min(len(rest), passages - len(kept)))))
    write_jsonl(folder / "corpus.jsonl", (record for record in corpus if record["_id"] in kept))
    queries = (record for _, record in read_jsonl(source / "queries.jsonl"))
    write_jsonl(folder / "queries.jsonl", (record for record in queries if record["_id"] in chosen))
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    lines = [judgements[0], *(line for line in judgements[1:] if line.split("\t")[0] in chosen)]
    (folder / "qrels" / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def measure_copies_and_guides(
    collection: Collection, squad: Path, embed: Embed, guide: Guide | None = None, **options: Any
) -> dict[str, Any]:
    """By setting: shares of copies and of passages with the answer among the negatives, and of questions without any."""
    answers = read_answers(squad)
    figures: dict[str, Any] = {}
    for key in ("before", "with the key"):
        with compared_as_before() if key == "before" else contextlib.nullcontext():
            index = PassageIndex(collection)
            queries = mining_queries(collection, index)
            ranking = rank(queries, index, embed)
            keys = [text_key(text) for text in index.texts]

            def is_copy(place: int, query: MiningQuery, keys: list[str] = keys) -> bool:
                return any(keys[place] == keys[positive] for positive in query.positives)

            def holds(place: int, query: MiningQuery, keys: list[str] = keys) -> bool:
                return any(answer in keys[place] for answer in answers[normalize_text(query.text)])

            guides = {"": None}
            if key != "before":
                guides |= {", guide BM25": BM25Guide(), ", a guide that knows the answers": KnowingGuide(holds)}
                guides |= {} if guide is None else {", guide: a trained encoder": guide}
            for limit, (name, judge) in itertools.product(_LIMITS, guides.items()):
                selection = SelectionArguments(**{"max_positive_ratio": limit} | options)
                miner = NegativeMiner(index=index, selection=selection, guide=judge)
                copies = false = total = without = 0
                for query, mined in zip(queries, miner.select(queries, ranking)):
                    found = [place for place in mined.places if is_copy(place, query)]
                    copies += len(found)
                    false += sum(holds(place, query) for place in mined.places if place not in found)
                    total += len(mined.places)
                    without += not mined.places
                figures[f"at most {limit:.0%}, {key}{name}"] = {
                    "queries": len(queries),
                    "negatives": total,
                    "copies": round(copies / total, 5),
                    "hold the answer": round(false / total, 5),
                    "queries without negatives": round(without / len(queries), 5),
                    **miner.counts,
                }
    return dict(sorted(figures.items()))


def _rules(**ratios: tuple[float, ...]) -> dict[str, dict[str, Any]]:
    return {
        f"{rule}, {ratio:.0%}": {"positive_score": rule, "max_positive_ratio": ratio}
        for rule, found in ratios.items()
        for ratio in found
    }


RULES = _rules(lowest=(0.95, 0.97), mean=(0.93, 0.95, 0.97), highest=(0.9, 0.93, 0.95))
CENTRED = {
    f"centred: {name}": options
    for name, options in _rules(lowest=(0.8, 0.9, 0.95), mean=(0.8, 0.9), highest=(0.6, 0.7, 0.8, 0.9)).items()
}


def centred(embed: Embed) -> Embed:
    """Embeddings without the mean of the passages, which are embedded first."""
    mean = torch.zeros(())

    def embed_centred(kind: str, texts: Sequence[str]) -> torch.Tensor:
        nonlocal mean
        embeddings = embed(kind, texts)
        mean = embeddings.mean(0) if kind == "passage" else mean
        return torch.nn.functional.normalize(embeddings - mean)

    return embed_centred


def measure_several_positives(
    collection: Collection, embed: Embed, rules: dict[str, dict[str, Any]], **shared: Any
) -> dict[str, Any]:
    """By rule: share of hidden positives that are mined; negatives a query, and queries without any."""
    index = PassageIndex(collection)
    several = [query for query in mining_queries(collection, index) if len(query.positives) > 1]
    hidden = []
    for query in several:
        for place in query.positives if len(query.positives) > 2 else ():
            positives = [other for other in query.positives if other != place]
            hidden.append((place, dataclasses.replace(query, positives=positives, excluded=query.excluded - {place})))
    known_ranking, hidden_ranking = rank(several, index, embed), rank([query for _, query in hidden], index, embed)
    figures = {}
    for name, options in rules.items():
        miner = NegativeMiner(index=index, selection=SelectionArguments(**shared, **options))
        found = miner.select([query for _, query in hidden], hidden_ranking)
        false = sum(place in mined.places for (place, _), mined in zip(hidden, found))
        known = list(miner.select(several, known_ranking))
        left = [len(mined.places) for mined in known]
        figures[name] = {
            "hidden positives": len(hidden),
            "mined": false,
            "queries": len(several),
            "negatives": sum(left),
            "queries without negatives": sum(not number for number in left),
            "sum of scores": round(sum(sum(mined.scores) for mined in known), 4),
        }
    return figures


def rows_of_copies(results: dict[str, Any]) -> list[dict[str, str]]:
    """A row a setting."""
    rows = []
    for name in next(iter(results.values())):
        found = {language: figures[name] for language, figures in results.items()}
        kinds = {"copies": "copies", "hold the answer": "hold the answer", "lost": "queries without negatives"}
        shares = {f"{kind}, {la}": f"{100 * f[key]:.1f}%" for la, f in found.items() for kind, key in kinds.items()}
        rows.append({"negatives": name} | shares)
    return rows


def rows_of_several(results: dict[str, Any]) -> list[dict[str, str]]:
    """A row a rule, all languages together: hidden positives are few."""
    rows = []
    for name in next(iter(results.values())):
        sums = Counter[str]()
        for figures in results.values():
            sums.update(figures[name])
        rows.append(
            {
                "limit": name,
                "hidden positives mined": f"{sums['mined']} of {sums['hidden positives']}",
                "negatives a query": f"{sums['negatives'] / sums['queries']:.2f}",
                "mean cosine": f"{sums['sum of scores'] / sums['negatives']:.3f}",
                "queries lost": f"{sums['queries without negatives']} of {sums['queries']}",
            }
        )
    return rows


def main() -> None:
    """The command line."""
    parser = benchmark_parser(__doc__, "false_negatives_rules.json")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--squad", type=Path, nargs="+", help="files in SQuAD's shape: copies and guides")
    source.add_argument("--beir", type=Path, nargs="+", help="folders in BEIR's layout: several positives")
    parser.add_argument("--languages", nargs="+", required=True, help="a name for each of them")
    parser.add_argument("--guide", help="with --squad: an encoder as another guide")
    parser.add_argument("--work", type=Path, default=Path("runs/false_negatives_rules"))
    parser.add_argument("--passages", type=int, help="of each file: 250, of a folder: 1500")
    parser.add_argument("--questions", type=int, default=400, help="of each of SQuAD's files")
    parser.add_argument("--negatives", type=int, default=8)
    parser.add_argument("--query_max_len", type=int, default=64)
    parser.add_argument("--passage_max_len", type=int, default=128)
    args = parser.parse_args()
    encoding = EncodingArguments(args.query_max_len, args.passage_max_len)
    encoder = open_encoder(args.model, encoding)
    embed = kept_embeddings(encoder, encoding, args.work / "embeddings")
    guide = None
    if args.guide is not None:
        guide = Guide(open_encoder(args.guide, encoding), encoding, args.work / "embeddings")
    results, shared = {}, {"negatives": args.negatives}
    for path, language in zip(args.squad or args.beir, args.languages, strict=True):
        if args.squad:
            collection = with_copies(path, language, args.work, args.passages or 250, args.questions)
            results[language] = measure_copies_and_guides(collection, path, embed, guide, **shared)
            continue
        part = cut(path, args.work / "beir" / path.name, args.passages or 1500)
        options = ["--language", language, "--output", str(args.work), "--overwrite", "true"]
        prepare(["--beir", str(part), *options])
        collection = Collection.load(args.work, language, "train")
        results[language] = measure_several_positives(collection, embed, RULES, **shared)
        results[language] |= measure_several_positives(collection, centred(embed), CENTRED, **shared)
    rows = rows_of_copies(results) if args.squad else rows_of_several(results)
    subset = {"passages": args.passages or (250 if args.squad else 1500)}
    subset |= {"questions": args.questions} if args.squad else {}
    write_result(
        args.output,
        f"Of {args.negatives} mined negatives a query, how many are false, and how many queries are left without any."
        if args.squad
        else f"Positives that were hidden and mined as negatives ({args.negatives} a query), by the positive that sets the limit.",
        {
            "model": Path(args.model).name,
            "precision": str(encoder.dtype).removeprefix("torch."),
            "device": pick_device(args.device),
            "sources": [path.name for path in args.squad or args.beir],
            **subset,
            "negatives": args.negatives,
            "query_max_len": args.query_max_len,
            "passage_max_len": args.passage_max_len,
        },
        rows,
        results,
    )
    for row in rows:
        print(
            "  ".join(f"{value:<44}" if key in ("negatives", "limit") else f"{value:>9}" for key, value in row.items())
        )


def kept_embeddings(encoder: Encoder, encoding: EncodingArguments, folder: Path) -> Embed:
    """Embeds every text once only; passages also when the benchmark is run again."""
    queries: dict[tuple[str, ...], torch.Tensor] = {}

    def embed(kind: str, texts: Sequence[str]) -> torch.Tensor:
        if kind == "passage":
            return encode_passages(encoder, texts, encoding, cache=folder)[: len(texts)].float()
        if tuple(texts) not in queries:
            queries[tuple(texts)] = encode_queries(encoder, texts, encoding)
        return queries[tuple(texts)]

    return embed


if __name__ == "__main__":
    main()
