"""Have a language model judge the negatives of training data: what answers its query is no negative.

1. Of each line the doubtful negatives are found: those that score nearly as high as a positive (``margin``), or highest of all
   (``share``), by the scores in the file or an encoder's. A negative that is a known positive of the same query needs no judge.
2. The model sees a query with several of its passages, in a shuffled order, and says of each whether it answers, answers in
   part, or does not. Each answer goes to the journal first, so that a stopped job goes on without asking again.
3. Passages without a verdict are asked about once more, and then kept where they were.
4. What answers becomes a positive or is dropped, what answers in part is dropped. Positives can be judged, too.

As RLHN (arXiv:2505.16967) and ARHN (arXiv:2604.11092) do it; they ask about all negatives.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.common.files import refuse_existing, refuse_input, refuse_unwritable
from clpl_moe.common.options import refuse_given
from clpl_moe.common.output import Output, writing
from clpl_moe.judge.options import JudgeArguments
from clpl_moe.retrieval.options import EncodingArguments, open_encoder

if TYPE_CHECKING:
    from clpl_moe.judge.job import Example, Job

__all__ = ["Judged", "judge"]


@dataclass
class Judged:
    """What a job did; with ``dry_run`` the plan alone."""

    plan: dict[str, int]  # passages and requests before anything was asked, by name
    counts: dict[str, int] = field(default_factory=dict)  # answers, tokens, verdicts and what came of them, by name
    examples: list[Example] = field(default_factory=list)  # of passages that changed their place: what, query, passage
    paths: list[Path] = field(default_factory=list)  # the lines, the verdicts
    unanswered: int = 0  # questions to which no answer came; a call with `overwrite` asks these again


@takes_options(JudgeArguments, EncodingArguments)
def judge(
    arguments: JudgeArguments,
    encoding: EncodingArguments,
    planned: Callable[[Mapping[str, int]], None] | None = None,
) -> Judged:
    """Ask a language model which passages answer their queries, and write the training lines anew.

    ``planned`` is called with the plan before anything is asked.

    Raises:
        UserError: a mistake in options or data, or a server that gives no answers. Answers stay in the journal.
    """
    if arguments.score_model is None:
        of_local = ("trust_remote_code",) if arguments.backend == "transformers" else ()
        refuse_given(encoding, "score_model", but=of_local)
    encoding.refuse_search("each line's own passages are scored")
    journal = arguments.beside("journal")
    with contextlib.nullcontext(Output(journal)) if arguments.dry_run else writing(journal) as output:
        return _judge(arguments, encoding, planned, output)


def _judge(
    arguments: JudgeArguments,
    encoding: EncodingArguments,
    planned: Callable[[Mapping[str, int]], None] | None,
    output: Output,
) -> Judged:
    from clpl_moe.judge.job import JOURNAL, Job, output_paths
    from clpl_moe.llm.asking import naming_the_journal
    from clpl_moe.llm.backends import open_backend
    from clpl_moe.llm.journal import Journal, read_journal

    journal_path = output.path
    refuse_unwritable(journal_path)
    main, verdicts = output_paths(arguments)
    refuse_existing(main, arguments.overwrite)
    job = Job(arguments)
    for path in (main, verdicts):
        refuse_input(path, (read for file in job.files for read in file.paths))
    before, _ = read_journal(journal_path, JOURNAL, job.settings, arguments.overwrite)
    refuse_existing(verdicts, arguments.overwrite)
    with contextlib.ExitStack() as stack:
        _read(job, encoding, output, stack)  # embeddings stay until the files are written
        if not job.found["negatives"] and not arguments.positives:
            fault = "found no negatives in its lines, so nothing can be judged; mine finds some, positives true judges positives"
            raise OptionError("train_data", fault)
        plan = job.plan(before)
        if planned is not None:
            planned(plan)
        if arguments.dry_run:
            return Judged(plan)
        backend = open_backend(arguments, encoding.trust_remote_code) if plan["requests to make"] else None
        with Journal(journal_path, JOURNAL, job.settings, arguments.overwrite) as journal:
            if backend is not None:
                with naming_the_journal(journal):
                    job.ask(backend, journal)
            answers = journal.answers
        if backend is not None and not job.verdicts:
            reason = Counter(job.reasons().values()).most_common(1)[0][0]
            raise UserError(f"not one passage was judged, mostly: {reason}; answers are in {journal_path}")
        done: Counter[str] = Counter()
        # A file that is replaced is whole at any time.
        with output.unfinished(*(path for path in (main, verdicts) if not path.exists())):
            paths = job.write(done)
    requests = 0 if backend is None else backend.requests
    counted = job.count(answers, sum(map(len, before.values())), done)
    counts = {"requests sent, retries included": requests, **counted}
    return Judged(plan, counts, job.examples(), paths, len(job.no_answer))


def _read(job: Job, encoding: EncodingArguments, output: Output, stack: contextlib.ExitStack) -> None:
    """Read a job's files, with the scores that its options ask for."""
    from clpl_moe.data.schema import training_lines
    from clpl_moe.encoder.settings import check_lengths
    from clpl_moe.judge.scores import scores_of_encoder, scores_of_file
    from clpl_moe.retrieval.store import cache_folder

    arguments = job.arguments
    if arguments.ask == "all":
        job.read(None)
    elif arguments.score_model is None:
        job.read(scores_of_file)
    else:
        encoder = open_encoder(arguments.score_model, encoding, arguments.score_revision)
        check_lengths(encoder.model, encoding.query_max_len, encoding.passage_max_len)
        cache = None
        if not arguments.dry_run or encoding.cache_dir is not None:
            cache = stack.enter_context(cache_folder(encoding, beside=output.embeddings))
        job.read(scores_of_encoder(training_lines(job.files), encoder, encoding, cache))
