"""Have a language model write queries for the negatives that have none.

1. Every distinct passage (Unicode NFC, white space folded) that stands in ``neg`` without a query is found. One that
   has queries elsewhere in the files, in ``neg_q`` or as a positive, gets these.
2. The model is asked about each of the others, once. Each answer goes to the journal before anything else is done with
   it, so that a stopped job goes on without asking again.
3. Answers are cleaned and checked. A passage without a usable query is asked about once more.
4. Round trip, if wanted: a query for which an encoder does not find the passage among the first n is dropped. The
   passages' embeddings lie on disk, so that this step goes on, too.
5. The lines are written again with ``neg_q`` filled. Beside them lie the new queries by passage id, in the form of a
   collection's ``positive_queries.jsonl``, and the passages without a query with the reason.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import refuse_existing, refuse_input, refuse_unwritable
from clpl_moe.common.options import refuse_given
from clpl_moe.common.output import Output, writing
from clpl_moe.retrieval.options import EncodingArguments, open_encoder
from clpl_moe.synthesize.options import SynthesizeArguments

__all__ = ["Synthesized", "synthesize"]


@dataclass
class Synthesized:
    """What a job did; with ``dry_run`` the plan alone."""

    plan: dict[str, int]  # passages and requests before anything was asked, by name
    counts: dict[str, int] = field(default_factory=dict)  # answers, tokens and queries, by name
    paths: list[Path] = field(default_factory=list)  # the filled lines, the new queries by passage id, the failures
    unanswered: int = 0  # passages for which no answer came; a call with `overwrite` asks about these again


@takes_options(SynthesizeArguments, EncodingArguments)
def synthesize(
    arguments: SynthesizeArguments,
    encoding: EncodingArguments,
    planned: Callable[[Mapping[str, int]], None] | None = None,
) -> Synthesized:
    """Ask a language model for queries and write the training lines with them.

    ``planned`` is called with the plan before anything is asked.

    Raises:
        UserError: a mistake in options or data, or a server that gives no answers. Answers stay in the journal.
    """
    if arguments.round_trip_model is None:
        of_local = ("trust_remote_code",) if arguments.backend == "transformers" else ()
        refuse_given(encoding, "round_trip_model", but=of_local)
    journal = arguments.beside("journal")
    with contextlib.nullcontext(Output(journal)) if arguments.dry_run else writing(journal) as output:
        return _synthesize(arguments, encoding, planned, output)


def _synthesize(
    arguments: SynthesizeArguments,
    encoding: EncodingArguments,
    planned: Callable[[Mapping[str, int]], None] | None,
    output: Output,
) -> Synthesized:
    from clpl_moe.encoder.settings import check_lengths
    from clpl_moe.llm.asking import naming_the_journal
    from clpl_moe.llm.backends import open_backend
    from clpl_moe.llm.journal import Journal, read_journal
    from clpl_moe.retrieval.store import cache_folder
    from clpl_moe.synthesize.job import JOURNAL, Job, output_paths
    from clpl_moe.synthesize.round_trip import drop_lost_queries

    journal_path = output.path
    refuse_unwritable(journal_path)
    main, *beside = output_paths(arguments)
    refuse_existing(main, arguments.overwrite)
    job = Job(arguments)
    for path in (main, *beside):
        refuse_input(path, (read for file in job.files for read in file.paths))
    before, _ = read_journal(journal_path, JOURNAL, job.settings, arguments.overwrite)
    for path in beside:  # after the journal, whose message says more
        refuse_existing(path, arguments.overwrite)
    plan = job.plan(before)
    if planned is not None:
        planned(plan)
    if arguments.dry_run:
        return Synthesized(plan)
    backend = open_backend(arguments, encoding.trust_remote_code) if plan["requests to make"] else None
    # Before answers are paid for, too: only a loaded one shows that it is whole, and what lengths it takes.
    encoder = None
    if arguments.round_trip_model is not None:
        encoder = open_encoder(arguments.round_trip_model, encoding, arguments.round_trip_revision)
        check_lengths(encoder.model, encoding.query_max_len, encoding.passage_max_len)
    with Journal(journal_path, JOURNAL, job.settings, arguments.overwrite) as journal:
        if backend is not None:
            with naming_the_journal(journal):
                job.ask(backend, journal)
        answers = journal.answers
    if job.no_answer and not any(key in answers for key in job.wanted):
        reason = Counter(job.no_answer.values()).most_common(1)[0][0]
        raise UserError(f"not one passage was answered, mostly: {reason}")
    job.take(answers)
    dropped: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        if encoder is not None:  # its embeddings stay until the files are written
            cache = stack.enter_context(cache_folder(encoding, beside=output.embeddings))
            dropped["queries dropped by the round trip"] = drop_lost_queries(job, encoder, encoding, cache)
        # A file that is replaced is whole at any time.
        with output.unfinished(*(path for path in (main, *beside) if not path.exists())):
            paths = job.write()
    requests = 0 if backend is None else backend.requests
    counts = {"requests sent, retries included": requests, **job.count(answers, before, dropped)}
    return Synthesized(plan, counts, paths, len(job.no_answer))
