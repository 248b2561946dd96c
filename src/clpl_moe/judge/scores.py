"""How similar query and passages of a line are: as the file says, or an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import OptionError
from clpl_moe.encoder import Encoder
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.retrieval.store import encode_passages, encode_queries

# Of the positives and of the negatives of a line, which is given with its place.
Scores = Callable[[str, dict[str, Any]], tuple[list[float], list[float]]]


def scores_of_file(place: str, record: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The scores that a line holds, as ``mine`` writes them."""
    for name in ("pos_scores", "neg_scores"):
        if record.get(name) is None:
            hint = "name an encoder that computes the scores, or judge all negatives (ask all)"
            raise OptionError("score_model", f"needed, since {place} has no {name}: {hint}")
    return record["pos_scores"], record["neg_scores"]


def scores_of_encoder(
    lines: Iterable[tuple[str, dict[str, Any]]], encoder: Encoder, encoding: EncodingArguments, cache: Path | None
) -> Scores:
    """Cosine similarities of all that stands in training lines. The embeddings lie in ``cache``, or in memory."""
    rows: dict[str, int] = {}
    query_rows: dict[str, int] = {}
    for _, record in lines:
        query_rows.setdefault(record["query"], len(query_rows))
        for text in (*record["pos"], *(record.get("neg") or ())):
            rows.setdefault(text, len(rows))
    queries = encode_queries(encoder, list(query_rows), encoding)  # (Q, D)
    passages = encode_passages(encoder, list(rows), encoding, cache=cache)  # (P, D)

    def scores(_: str, record: dict[str, Any]) -> tuple[list[float], list[float]]:
        texts = [*record["pos"], *(record.get("neg") or ())]
        found = passages[[rows[text] for text in texts]].float() @ queries[query_rows[record["query"]]].float()
        values = found.tolist()
        return values[: len(record["pos"])], values[len(record["pos"]) :]

    return scores
