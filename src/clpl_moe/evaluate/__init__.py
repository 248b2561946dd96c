"""Evaluation: retrieve from collections with one or more models, score the rankings, compare the models.

The options say which files this writes. With ``m3_scores`` each dense run's first passages are also ranked by BGE-M3's
sparse and multi-vector scores (:mod:`clpl_moe.evaluate.m3`). Embeddings lie on disk: an interrupted encoding resumes, the
search reads them in parts, and under ``torchrun`` each process encodes its share.
"""

from __future__ import annotations

import sys
from pathlib import Path

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import OptionError
from clpl_moe.common.output import Output, writing
from clpl_moe.evaluate.metrics import check_metrics, evaluate_run, read_trec_run, warn_of_cut
from clpl_moe.evaluate.options import EvaluateArguments
from clpl_moe.evaluate.results import Evaluation, Result
from clpl_moe.evaluate.significance import compare_results
from clpl_moe.evaluate.tasks import CurrentEncoder, plan_tasks
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments

__all__ = ["EvaluateArguments", "Evaluation", "Result", "evaluate"]


@takes_options(EvaluateArguments, EncodingArguments)
def evaluate(arguments: EvaluateArguments, encoding: EncodingArguments) -> Evaluation:
    """Evaluate every model on every language, and compare the models.

    All faults that can be found without encoding are raised before anything is encoded. Of several processes
    (``torchrun``) the first one writes; the others encode their share and return no results.

    Raises:
        UserError: a fault in a collection, an unknown model or metric, results of something else in the way.
    """
    with writing(arguments.output, inside=True) as output:
        return _evaluate(arguments, encoding, output)


def _evaluate(arguments: EvaluateArguments, encoding: EncodingArguments, output: Output) -> Evaluation:
    from clpl_moe.evaluate.evaluation import rank_by_embeddings, rerank_by_heads
    from clpl_moe.evaluate.shared import TABLE, refuse_others_files, write_shared_files
    from clpl_moe.retrieval.store import processes

    check_metrics(arguments.metrics)
    collections = {
        language: Collection.load(arguments.collection, language, arguments.split)
        for language in dict.fromkeys(arguments.languages)
    }
    evaluation = Evaluation([], [], Path(arguments.output, TABLE))
    computed: set[tuple[str, str]] = set()  # label and language
    with processes() as first:
        current = CurrentEncoder(encoding, arguments.revisions)
        tasks = plan_tasks(collections, arguments, current)
        if arguments.m3_scores and not any(task.heads for task in tasks):
            fault = "no model has sparse and multi-vector heads (sparse_linear.pt, colbert_linear.pt)"
            raise OptionError("m3_scores", fault)
        refuse_others_files(Path(arguments.output))
        if first:
            most = max(len(collection.passages) for collection in collections.values())
            warn_of_cut(arguments.metrics, arguments.top_k, most)
            if arguments.m3_scores and arguments.rerank_top < arguments.top_k:
                warn_of_cut(arguments.metrics, arguments.rerank_top, most, "ranked by m3_scores", "rerank_top")
        for task in tasks:
            found = None if arguments.overwrite else task.finished()
            if found is None:
                work = rerank_by_heads if task.heads else rank_by_embeddings
                found = work(task, current.open(task.model), arguments, encoding, output)
                computed.add((task.label, task.collection.language))
            elif first:
                print(f"{task.file}: the same model, collection and settings; not computed again", file=sys.stderr)
            if not first or found is None:
                continue
            for score, path in task.runs.items():
                run = read_trec_run(path, task.collection)
                metrics, per_query = evaluate_run(task.collection.qrels, run, arguments.metrics)
                about = found | task.names
                names = (task.model, task.label, task.collection.language, score)
                evaluation.results.append(Result(*names, metrics, per_query, task.folder, about))
    if not first:
        return evaluation
    evaluation.comparisons = compare_results(evaluation.results, arguments.compared_metrics)
    folder = Path(arguments.output)
    write_shared_files(folder, collections, evaluation.results, arguments.metrics, evaluation.comparisons, computed)
    return evaluation
