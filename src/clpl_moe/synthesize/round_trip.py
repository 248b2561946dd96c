"""The round trip: a written query has to find its passage among those of the training files and of a collection."""

from __future__ import annotations

from pathlib import Path

from clpl_moe.encoder import Encoder
from clpl_moe.retrieval.nearest import nearest
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.retrieval.store import encode_passages, encode_queries
from clpl_moe.synthesize.job import Job
from clpl_moe.synthesize.passages import SearchedPassages


def drop_lost_queries(job: Job, encoder: Encoder, encoding: EncodingArguments, cache: Path) -> int:
    """Drop a job's queries that do not find their passage among the first ranks; returns how many."""
    asked = [(key, query) for key, queries in job.queries.items() for query in queries]
    if not asked:
        return 0
    queries = encode_queries(encoder, [query for _, query in asked], encoding)
    embeddings = encode_passages(encoder, SearchedPassages(job.passages, job.corpus), encoding, cache=cache)
    top = job.arguments.round_trip_top
    _, ranked = nearest(queries.to(encoder.model.device), embeddings, top, encoding)
    places = {key: place for place, key in enumerate(job.passages)}
    kept: dict[str, list[str]] = {}
    for (key, query), row in zip(asked, ranked.tolist()):
        if places[key] in row:
            kept.setdefault(key, []).append(query)
    for key in job.queries:
        if key not in kept:
            job.failures[key] = f"round trip: passage not among the first {top}"
    job.queries = kept
    return len(asked) - sum(map(len, kept.values()))
