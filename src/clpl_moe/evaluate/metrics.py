"""Retrieval metrics through ``ir_measures`` (trec_eval's numbers), and run files in the format of TREC."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open, read_lines
from clpl_moe.retrieval.collection import Collection

Run = Mapping[str, Mapping[str, float]]

DEFAULT_METRICS = ("nDCG@5", "nDCG@10", "R@100")
# Of the evaluation command: those above and what the literature on MIRACL reports besides (RR@10 is MRR@10, AP is MAP).
EVALUATION_METRICS = ("nDCG@5", "nDCG@10", "nDCG@20", "R@100", "R@1000", "RR@10", "AP")

# The kinds of score, each with its own run file: the embeddings' similarity, and those of BGE-M3's heads and their sums.
DENSE = "dense"
M3_SCORES = ("sparse", "multi-vec", "dense+sparse", "all")
# Of dense, sparse and multi-vec in the sums: the M3 report's on MIRACL.
M3_WEIGHTS = (1.0, 0.3, 1.0)
_UNCUT = 1000  # passages that metrics without a cut-off count, as runs of TREC have


def run_file(score: str) -> str:
    """Name of the run file of a kind of score."""
    return "run.trec" if score == DENSE else f"run.{score}.trec"


def check_metrics(metrics: Sequence[str]) -> dict[str, Any]:
    """The measures of ``ir_measures`` by name; raises :class:`UserError` for a name that it does not know."""
    import ir_measures

    measures = {}
    for name in metrics:
        try:
            measure = ir_measures.parse_measure(name)
            cutoff = measure.params.get("cutoff", 1)
            if not isinstance(cutoff, int) or cutoff < 1:
                raise ValueError  # trec_eval would crash
            # A name may parse but lack its cutoff, or be of a program that does not run here.
            ir_measures.calc([measure], {"q": {"p": 1}}, {"q": {"p": 1.0}})
        except Exception:
            expected = "expected names such as nDCG@10, R@100, RR@10, AP"
            raise UserError(
                f"metric '{name}' is unknown to ir_measures, or cannot be computed here; {expected}"
            ) from None
        measures[name] = measure
    return measures


def warn_of_cut(
    metrics: Sequence[str], depth: int, passages: float = math.inf, what: str = "retrieved", option: str = "top_k"
) -> None:
    """Say on stderr which metrics count more than the first ``depth`` of a collection's ``passages``: ``what`` was done with
    these alone, as ``option`` says."""
    cut = [name for name, measure in check_metrics(metrics).items() if measure.params.get("cutoff", _UNCUT) > depth]
    if cut and passages > depth:
        why = f"only {depth:,} passages are {what} for each query ({option}), and others count as not found"
        print(f"warning: {', '.join(cut)}: {why}", file=sys.stderr)


def evaluate_run(
    qrels: Mapping[str, Mapping[str, int]], run: Run, metrics: Sequence[str] = DEFAULT_METRICS
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Score a run (query id -> passage id -> score) as trec_eval does with its option ``-c``.

    The means are over all queries of ``qrels``: one that the run lacks, or that has no relevant passage, scores 0; one of
    the run that ``qrels`` lack does not count. A relevant passage that is nowhere in the run counts as never found. Passages
    of equal score (as 32-bit floats) are ranked by descending id. trec_eval has no reciprocal rank with a cut-off: RR@10 is
    by ``ir_measures`` that of MS MARCO's script, which ranks equal scores by ascending id.

    Returns:
        metric -> mean, and query id -> metric -> value; metrics in the spelling of ``ir_measures``: ``nDCG@10``, ``AP``.
    """
    import ir_measures

    measures = check_metrics(metrics)
    # In the order and precision of a run file, so that both score the same.
    ranked = {query_id: dict(_ranked(scores)) for query_id, scores in run.items()}
    result = ir_measures.calc(list(measures.values()), qrels, ranked)
    per_query: dict[str, dict[str, float]] = {query_id: {} for query_id in qrels}
    for value in result.per_query:
        # MRR and RR, say, are names of one measure.
        names = [name for name, measure in measures.items() if measure == value.measure]
        per_query[value.query_id].update(dict.fromkeys(names, float(value.value)))
    means = cast("dict[Any, float]", result.aggregated)  # a number for one measure, a dictionary for a list of them
    return {name: float(means[measure]) for name, measure in measures.items()}, per_query


def write_trec_run(path: str | Path, run: Run, tag: str) -> None:
    """Write a run file, ``query-id Q0 passage-id rank score tag`` a line, whole or not at all: with trec_eval's ranks, and
    scores of which the same 32-bit float is read back, so that metrics of the file are metrics of ``run``."""
    tag = "_".join(tag.split()) or "run"
    with atomic_open(path) as file:
        for query_id, scores in run.items():
            for rank, (passage_id, score) in enumerate(_ranked(scores), 1):
                file.write(f"{query_id} Q0 {passage_id} {rank} {score:.9g} {tag}\n")


def read_trec_run(path: str | Path, collection: Collection | None = None) -> dict[str, dict[str, float]]:
    """Read a run file: query id -> passage id -> score, in its order; raises :class:`UserError` for a line of another form,
    and for an id that ``collection`` lacks."""
    run: dict[str, dict[str, float]] = {}
    for number, _, raw in read_lines(path, may_be_empty=True):
        try:
            # Before decoding: only ASCII's white space separates fields.
            query_id, _, passage_id, _, score, _ = (word.decode() for word in raw.split())
            if not math.isfinite(float(score)) or b"\0" in raw:  # code 0 would end an id in trec_eval
                raise ValueError
        except ValueError:  # of UTF-8, too
            found, expected = raw.strip().decode(errors="replace"), "'query-id Q0 passage-id rank score tag'"
            raise UserError(f"{at(path, number)}: found {found!r}, expected {expected}") from None
        if passage_id in (ranked := run.setdefault(query_id, {})):
            raise UserError(f"{at(path, number)}: the passage '{passage_id}' stands twice for the query '{query_id}'")
        ranked[passage_id] = float(score)
    if collection is not None:
        _refuse_unknown(path, run, collection)
    return run


def _refuse_unknown(path: str | Path, run: Run, collection: Collection) -> None:
    queries = run.keys() - set(collection.query_ids)
    passages = {passage_id for scores in run.values() for passage_id in scores}
    passages.difference_update(collection.passage_ids)  # which may lie on disk: they are read once
    if not queries and not passages:
        return
    for number, _, raw in read_lines(path):
        query_id, _, passage_id, *_ = raw.decode().split()
        for identifier, unknown, kind in ((query_id, queries, "query"), (passage_id, passages, "passage")):
            if identifier in unknown:
                expected = f"the id of a {kind} of {collection.directory / collection.language}"
                raise UserError(f"{at(path, number)}: found {identifier!r}, expected {expected}")


def write_trec_qrels(path: str | Path, qrels: Mapping[str, Mapping[str, int]]) -> None:
    """Write judgements: ``query-id 0 passage-id relevance`` a line, whole or not at all."""
    with atomic_open(path) as file:
        for query_id, judged in qrels.items():
            for passage_id, relevance in judged.items():
                file.write(f"{query_id} 0 {passage_id} {relevance}\n")


def _ranked(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Passages with their 32-bit scores in trec_eval's order: descending score, then descending id."""
    import numpy as np

    ranked = sorted(((float(np.float32(score)), passage_id) for passage_id, score in scores.items()), reverse=True)
    return [(passage_id, score) for score, passage_id in ranked]
