"""The round trip: a written query has to find its passage among those of the training files and of a collection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe.retrieval.options import EncodingArguments, open_encoder
from clpl_moe.synthesize.job import Outcome
from clpl_moe.synthesize.passages import Passage, SearchedPassages

if TYPE_CHECKING:
    from clpl_moe.encoder import Encoder


def open_round_trip_encoder(name: str, encoding: EncodingArguments) -> Encoder:
    """The encoder of the round trip; raises :class:`UserError` where it is missing or cannot take the lengths."""
    from clpl_moe.encoder.lengths import check_lengths

    encoder = open_encoder(name, encoding)
    check_lengths(encoder.model, encoding.query_max_len, encoding.passage_max_len)
    return encoder


def drop_lost_queries(
    outcome: Outcome,
    passages: Mapping[str, Passage],
    corpus: Sequence[str],
    top: int,
    *,
    encoder: Encoder,
    encoding: EncodingArguments,
    cache: Path,
) -> int:
    """Drop the queries that do not find their passage among the first ``top``.

    Args:
        outcome: the queries; those that stay, and the failures, are written to it.
        passages: of the training files, by key.
        corpus: further passages to search.
        top: ranks in which a passage has to be found.
        encoder: searches.
        encoding: lengths and batch size.
        cache: folder for the passages' embeddings.

    Returns:
        How many queries were dropped.
    """
    from clpl_moe.retrieval.search import search
    from clpl_moe.retrieval.store import encode_passages, encode_queries

    asked = [(key, query) for key, queries in outcome.queries.items() for query in queries]
    if not asked:
        return 0
    queries = encode_queries(encoder, [query for _, query in asked], encoding)
    searched = SearchedPassages(passages, corpus)
    embeddings = encode_passages(encoder, searched, encoding, cache=cache)
    _, ranked = search(queries.to(encoder.model.device), embeddings, top)
    places = {key: place for place, key in enumerate(passages)}
    kept: dict[str, list[str]] = {}
    for (key, query), row in zip(asked, ranked.tolist()):
        if places[key] in row:
            kept.setdefault(key, []).append(query)
    for key in outcome.queries:
        if key not in kept:
            outcome.failures[key] = f"round trip: passage not among the first {top}"
    outcome.queries = kept
    return len(asked) - sum(map(len, kept.values()))
