"""``python -m clpl_moe.mine``: training triplets with hard negatives and the queries that these do answer.

For each query of a split:

1. Passages of equal text (Unicode NFC, white space folded) count as one, empty ones not at all, nor those that the
   corpus reserves to another split (``split``).
2. All passages are ranked by cosine similarity to the query; those that are known to answer it are taken out:
   its relevant passages, and passages that have the same question among their known queries.
3. From a window of the ranks that are left, negatives are taken from the top or drawn at random.
4. Each negative brings the queries that it is known to answer (of the judgements and of
   ``positive_queries.jsonl``), or null.

A line has FlagEmbedding's fields ``query``, ``pos``, ``neg``, ``pos_scores`` and ``neg_scores`` (cosines),
the penalty's ``neg_q``, and the ids: ``query_id``, ``pos_ids``, ``neg_ids`` (of equal passages the first).
Prompts are not written into the texts: training and evaluation add them.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clpl_moe.cli import parse
from clpl_moe.errors import UserError, command
from clpl_moe.files import refuse_existing, write_jsonl
from clpl_moe.retrieval.collection import Collection, normalize_text, read_positive_queries
from clpl_moe.retrieval.options import Encoder, EncodingArguments, open_encoder


@dataclass
class MineArguments:
    """What to mine from, and which negatives to take."""

    model: str = field(metadata={"help": "model folder or hub name; normally the model that is to be trained"})
    collection: str = field(metadata={"help": "folder that holds a collection per language"})
    language: str = field(metadata={"help": "language: the folder in it"})
    output: str = field(metadata={"help": "JSONL file to write"})
    split: str = field(default="train", metadata={"help": "which queries and judgements"})
    # On KorQuAD and XQuAD the passage of rank 1 holds the answer, unjudged, twice as often as that of rank 2.
    rank_from: int = field(
        default=2, metadata={"help": "first rank of the window; rank 1 is too often right but not judged"}
    )
    rank_to: int = field(default=60, metadata={"help": "last rank of the window; known positives have no rank"})
    negatives: int = field(default=8, metadata={"help": "negatives for each query; training draws some each time"})
    sampling: Literal["top", "random"] = field(
        default="top", metadata={"help": "the window's first passages, or any of it, all equally likely"}
    )
    max_positive_queries: int = field(
        default=4,
        metadata={"help": "known queries written for a negative at most, drawn from more"},
    )
    seed: int = field(default=42, metadata={"help": "decides every draw"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output file"})

    def __post_init__(self) -> None:
        if not 1 <= self.rank_from <= self.rank_to:
            raise UserError(
                f"--rank_from {self.rank_from} --rank_to {self.rank_to}: expected 1 <= rank_from <= rank_to"
            )
        if not 1 <= self.negatives <= self.rank_to - self.rank_from + 1:
            raise UserError(
                f"--negatives: found {self.negatives}, the window from rank {self.rank_from} to"
                f" {self.rank_to} holds {self.rank_to - self.rank_from + 1}"
            )
        if self.max_positive_queries < 0:
            raise UserError(f"--max_positive_queries: found {self.max_positive_queries}, expected 0 or more")


class PassageIndex:
    """A collection's passages without repeated and empty texts, and the queries each is known to answer.

    Args:
        collection: the passages, and judgements that count as known queries.
        positive_queries: passage id and queries, further known ones; unknown ids are counted and left out.

    Attributes:
        ids: id of each distinct passage (the first of those that are equal).
        texts: its text.
        known: its known queries, by normalised text.
        number: passage id -> its place in these lists.
        answers: normalised query -> places of the passages known to answer it.
        unknown: how many entries of ``positive_queries`` name no passage of the corpus.
        reserved: how many passages belong to another split.
    """

    def __init__(self, collection: Collection, positive_queries: Iterable[tuple[str, Sequence[str]]] = ()) -> None:
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.number: dict[str, int] = {}
        self.reserved = 0
        places: dict[str, int] = {}
        for passage_id, text in zip(collection.passage_ids, collection.passages):
            if collection.reserved.get(passage_id, collection.split) != collection.split:
                self.reserved += 1
                continue
            normalized = normalize_text(text)
            if not normalized:
                continue
            place = places.setdefault(normalized, len(self.ids))
            if place == len(self.ids):
                self.ids.append(passage_id)
                self.texts.append(text)
            self.number[passage_id] = place
        self.known: list[dict[str, str]] = [{} for _ in self.ids]
        self.answers: dict[str, set[int]] = {}
        self.unknown = 0
        texts = dict(zip(collection.query_ids, collection.queries))
        for query_id, judged in collection.qrels.items():
            for passage_id, relevance in judged.items():
                if relevance > 0 and passage_id in self.number:
                    self._add(passage_id, texts[query_id])
        for passage_id, queries in positive_queries:
            if passage_id not in self.number:
                self.unknown += 1
                continue
            for query in queries:
                self._add(passage_id, query)

    def _add(self, passage_id: str, query: str) -> None:
        place, normalized = self.number[passage_id], normalize_text(query)
        self.known[place].setdefault(normalized, query)
        self.answers.setdefault(normalized, set()).add(place)

    def relevant(self, judged: Mapping[str, int]) -> list[int]:
        """Places of the relevant passages that the corpus has, each once."""
        found = (self.number[p] for p, relevance in judged.items() if relevance > 0 and p in self.number)
        return list(dict.fromkeys(found))


def mine(
    encoder: Encoder,
    collection: Collection,
    index: PassageIndex,
    arguments: MineArguments,
    encoding: EncodingArguments,
    *,
    progress: bool = True,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The training lines of a collection's queries, and counts of what was taken and what was not.

    Args:
        encoder: ranks the passages; its embeddings are normalised whatever its settings say.
        collection: queries and judgements.
        index: of the collection.
        arguments: the window and what to take from it.
        encoding: lengths and batch size.
        progress: whether to show bars.
    """
    from clpl_moe.retrieval.encode import encode
    from clpl_moe.retrieval.evaluation import check_finite
    from clpl_moe.retrieval.search import search

    counts: Counter[str] = Counter({"queries": len(collection.queries)})
    texts = dict(zip(collection.query_ids, collection.queries))
    positives: dict[str, list[int]] = {}
    excluded: dict[str, set[int]] = {}
    for query_id in collection.query_ids:
        relevant = index.relevant(collection.qrels.get(query_id, {}))
        if not relevant:
            counts["queries dropped: no relevant passage in the corpus"] += 1
            continue
        positives[query_id] = relevant
        excluded[query_id] = index.answers[normalize_text(texts[query_id])]
        counts["passages kept out: other passages known to answer the query"] += len(excluded[query_id]) - len(relevant)
    counts["passages kept out: reserved to another split"] = index.reserved
    duplicates = len(collection.passages) - index.reserved - len(index.ids)
    counts["passages kept out: empty or same text as another"] = duplicates
    if not positives:
        return [], counts
    how = {
        "settings": dataclasses.replace(encoder.settings, normalize=True),
        "batch_tokens": encoding.batch_tokens,
        "dtype": encoder.dtype,
        "progress": progress,
    }
    model, tokenizer = encoder.model, encoder.tokenizer
    wanted = [texts[query_id] for query_id in positives]
    queries = encode(model, tokenizer, wanted, kind="query", max_length=encoding.query_max_len, **how)
    check_finite(queries)
    passages = encode(model, tokenizer, index.texts, kind="passage", max_length=encoding.passage_max_len, **how)
    check_finite(passages)
    # Deep enough that the window is full when all that must not be in it has been taken out.
    depth = arguments.rank_to + max(map(len, excluded.values()))
    scores, ranked = search(queries.to(model.device), passages, depth)
    records = []
    for row, query_id in enumerate(positives):
        candidates = [
            (place, score)
            for place, score in zip(ranked[row].tolist(), scores[row].tolist())
            if place not in excluded[query_id]
        ]
        draw = random.Random(f"{arguments.seed} {query_id}")  # of its own, so that other queries do not matter
        window = candidates[arguments.rank_from - 1 : arguments.rank_to]
        if arguments.sampling == "random" and len(window) > arguments.negatives:
            window = [window[i] for i in sorted(draw.sample(range(len(window)), arguments.negatives))]
        chosen = window[: arguments.negatives]
        if not chosen:
            counts["queries dropped: no passage left in the window"] += 1
            continue
        neg_q = [_draw_queries(index.known[place], arguments.max_positive_queries, draw) for place, _ in chosen]
        pos_scores = (passages[positives[query_id]] @ queries[row]).tolist()
        records.append(
            {
                "query": texts[query_id],
                "pos": [index.texts[place] for place in positives[query_id]],
                "neg": [index.texts[place] for place, _ in chosen],
                "neg_q": neg_q,
                "pos_scores": [round(score, 6) for score in pos_scores],
                "neg_scores": [round(score, 6) for _, score in chosen],
                "query_id": query_id,
                "pos_ids": [index.ids[place] for place in positives[query_id]],
                "neg_ids": [index.ids[place] for place, _ in chosen],
            }
        )
        counts["negatives"] += len(chosen)
        counts["negatives with known queries"] += sum(q is not None for q in neg_q)
        counts["known queries of negatives"] += sum(len(q or ()) for q in neg_q)
        counts["negatives more similar than every positive"] += sum(score > max(pos_scores) for _, score in chosen)
        counts["queries with fewer negatives than asked for"] += len(chosen) < arguments.negatives
    counts["lines"] = len(records)
    return records, counts


def _draw_queries(known: Mapping[str, str], most: int, draw: random.Random) -> list[str] | None:
    """Up to ``most`` of the queries, in their order; None where there is none."""
    queries = list(known.values())
    if len(queries) > most:
        queries = [queries[i] for i in sorted(draw.sample(range(len(queries)), most))]
    return queries or None


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments, encoding = parse(
        [MineArguments, EncodingArguments],
        prog="clpl_moe.mine",
        description="Mine hard negatives and the queries that they are known to answer: training data.",
        argv=argv,
    )
    refuse_existing(arguments.output, arguments.overwrite)
    collection = Collection.load(arguments.collection, arguments.language, arguments.split)
    known = Path(arguments.collection, arguments.language, "positive_queries.jsonl")
    index = PassageIndex(collection, read_positive_queries(known) if known.exists() else ())
    encoder = open_encoder(arguments.model, encoding)
    records, counts = mine(encoder, collection, index, arguments, encoding)
    if index.unknown:
        counts[f"lines of {known.name} left out: passage not in the corpus"] = index.unknown
    width = max(map(len, counts))
    for name, count in counts.items():
        print(f"{name:<{width}}  {count:>9,}")
    if not records:
        raise UserError(f"no query of {collection.directory / collection.language} could be given negatives; see above")
    write_jsonl(arguments.output, records)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
