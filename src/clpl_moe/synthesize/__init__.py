"""``python -m clpl_moe.synthesize``: queries for the negatives that have none, written by a language model.

1. Every distinct passage (Unicode NFC, white space folded) that stands in ``neg`` without a query is found. One that
   has queries elsewhere in the files, in ``neg_q`` or as a positive, gets these.
2. The model is asked about each of the others, once. Each answer goes to the journal before anything else is done with
   it, so that a job that was stopped goes on without asking again.
3. Answers are cleaned and checked. Where no query is left, the passage is asked about once more.
4. Round trip, if wanted: a query for which an encoder does not find the passage among the first n is dropped. The
   passages' embeddings lie on disk, so that this goes on, too.
5. The lines are written again with ``neg_q`` filled; beside them the new queries by passage id, in the form of a
   collection's ``positive_queries.jsonl``, and the passages without a query with the reason.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tqdm.auto import tqdm

from clpl_moe.common.cli import print_counts
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import refuse_existing, refuse_unwritable, write_jsonl
from clpl_moe.data.schema import data_files
from clpl_moe.retrieval.collection import check_language, load_passages
from clpl_moe.retrieval.options import EncodingArguments, open_encoder
from clpl_moe.synthesize.answers import read_queries
from clpl_moe.synthesize.journal import Answer, Journal, Question, read_answers
from clpl_moe.synthesize.passages import SearchedPassages, fill_lines, read_passages
from clpl_moe.synthesize.prompts import fill, load_prompt

if TYPE_CHECKING:
    from clpl_moe.encoder import Encoder

_ASKED_AT_MOST = 2
_BYTES_PER_TOKEN = 4  # of UTF-8: what tokenizers of large models need for English, Korean, Persian and Hindi, roughly


@dataclass
class SynthesizeArguments:
    """Which passages get queries, who writes them, and what is kept."""

    train_data: list[str] = field(metadata={"help": "training JSONL files, or folders of them, as mine writes them"})
    output: str = field(
        metadata={"help": "JSONL file to write; its journal, store and failures get names that begin with its name"}
    )
    language: str = field(metadata={"help": "language of passages and queries, such as ko"})
    model: str = field(
        metadata={"help": "name of the language model; with --backend transformers its folder or hub name"}
    )
    backend: Literal["server", "transformers"] = field(
        default="server", metadata={"help": "an OpenAI-compatible server, or a model on this machine"}
    )
    base_url: str | None = field(
        default=None, metadata={"help": "address of the server, such as http://localhost:8000/v1; not given: OpenAI's"}
    )
    api_key_env: str | None = field(
        default=None, metadata={"help": "environment variable that holds the key; not given: OPENAI_API_KEY"}
    )
    queries_per_passage: int = field(default=1, metadata={"help": "queries for each passage"})
    known_queries: bool = field(
        default=True,
        metadata={"help": "do not ask about a passage that has queries elsewhere in the files, but use these"},
    )
    prompts: str | None = field(
        default=None, metadata={"help": "YAML file, language: prompt with {passage}; not given: the package's own"}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "not given: the server's own; 0.7 with --backend transformers"}
    )
    max_answer_tokens: int | None = field(
        default=None, metadata={"help": "longest answer; not given: the server's own; 256 with --backend transformers"}
    )
    request_options: str | None = field(
        default=None, metadata={"help": "further fields of each request to the server, a JSON object"}
    )
    concurrency: int = field(default=8, metadata={"help": "requests at once, or passages a batch"})
    timeout: float = field(default=120.0, metadata={"help": "seconds to wait for an answer"})
    max_retries: int = field(
        default=8, metadata={"help": "tries after a rate limit, server error, time-out or cut connection"}
    )
    max_query_chars: int = field(default=200, metadata={"help": "a query of more characters is not used"})
    round_trip_model: str | None = field(
        default=None, metadata={"help": "encoder that has to find the passage by its query; not given: no such check"}
    )
    round_trip_top: int = field(default=20, metadata={"help": "ranks in which it has to be found"})
    round_trip_collection: str | None = field(
        default=None,
        metadata={"help": "collection whose passages are searched, too; not given: only those of --train_data"},
    )
    dry_run: bool = field(default=False, metadata={"help": "print what would be asked, and stop"})
    overwrite: bool = field(
        default=False, metadata={"help": "replace the output files, and a journal of other settings"}
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("queries_per_passage", 1),
            ("concurrency", 1),
            ("max_retries", 0),
            ("max_query_chars", 2),
            ("max_answer_tokens", 1),
            ("round_trip_top", 1),
            ("temperature", 0),
        ):
            if (value := getattr(self, name)) is not None and not least <= value < float("inf"):
                raise UserError(f"--{name}: found {value}, expected at least {least}")
        if not self.timeout > 0:
            raise UserError(f"--timeout: found {self.timeout}, expected more than 0")
        check_language(self.language)
        if self.round_trip_collection and not self.round_trip_model:
            raise UserError("--round_trip_collection needs --round_trip_model, the encoder that searches it")
        if self.backend == "transformers":
            for name in ("base_url", "api_key_env", "request_options"):
                if getattr(self, name) is not None:
                    raise UserError(f"--{name} is for --backend server")
        self.request_fields()

    def request_fields(self) -> dict[str, Any]:
        """The fields of a request besides model and messages."""
        try:
            fields = json.loads(self.request_options or "{}")
            json.dumps(fields, allow_nan=False)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise UserError(f"--request_options: found {self.request_options!r}, expected a JSON object")
        given = {"temperature": self.temperature, "max_tokens": self.max_answer_tokens}
        return {name: value for name, value in given.items() if value is not None} | fields

    def beside(self, what: str) -> Path:
        """The path of what is written beside the output: ``train.jsonl`` has ``train.journal.jsonl``."""
        output = Path(self.output)
        return output.with_name(f"{output.name.removesuffix('.jsonl')}.{what}.jsonl")


class Backend(Protocol):
    """Who is asked: a server or a local model."""

    requests: int

    def ask(self, questions: Iterable[Question], done: Callable[[Question, Answer | str], None]) -> None:
        """Ask everything; hand over each answer, or why there is none, as it comes."""


@dataclass
class _Outcome:
    """Queries of the passages that were asked about, and why others have none."""

    queries: dict[str, list[str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


class _Job:
    """One run: the questions, the journal of their answers, and what these hold."""

    def __init__(self, arguments: SynthesizeArguments, encoding: EncodingArguments) -> None:
        self.arguments, self.encoding = arguments, encoding
        self.files = data_files(arguments.train_data)
        if Path(arguments.output).resolve().parent in {Path(path).resolve() for path in arguments.train_data}:
            raise UserError(
                f"--output {arguments.output}: lies in a folder of --train_data, every file of which is read as training"
                " data; name another folder"
            )
        self.prompt = load_prompt(arguments.language, arguments.prompts)
        self.settings = {
            "backend": arguments.backend,
            "model": arguments.model,
            "language": arguments.language,
            "queries_per_passage": arguments.queries_per_passage,
            "prompt": self.prompt,
            "request": arguments.request_fields(),
        }
        # What the round trip needs is used after the answers are paid for: said before, if it is not there.
        self.corpus: Sequence[str] = ()
        if arguments.round_trip_collection:
            self.corpus = load_passages(arguments.round_trip_collection, arguments.language)
        if arguments.round_trip_model:
            from clpl_moe.encoder.load import read_config

            read_config(arguments.round_trip_model)
        self.passages = read_passages(self.files)
        if not arguments.known_queries:
            for passage in self.passages.values():
                passage.negative_queries.clear()
        # Those without a query anywhere.
        self.wanted = {key: p for key, p in self.passages.items() if p.bare and not p.negative_queries}
        self.no_answer: dict[str, str] = {}

    def question(self, key: str) -> Question:
        prompt = fill(self.prompt, self.wanted[key].text, self.arguments.queries_per_passage)
        return Question(key, prompt)

    def read(self, key: str, answers: Sequence[Answer]) -> tuple[list[str], str | None]:
        """The usable queries of a passage's answers, or what is wrong with the last of these."""
        fault = None
        for answer in answers:
            if answer.text is None:
                fault = "reply not readable"
                continue
            queries, fault = read_queries(
                answer.text,
                self.wanted[key].text,
                language=self.arguments.language,
                wanted=self.arguments.queries_per_passage,
                max_chars=self.arguments.max_query_chars,
                cut=answer.cut,
            )
            if queries:
                return queries, None
        return [], fault

    def to_ask(self, answers: Mapping[str, Sequence[Answer]], attempt: int) -> list[str]:
        """Passages with ``attempt`` answers so far, none of them of use."""
        return [
            key for key in self.wanted if len(given := answers.get(key, ())) == attempt and not self.read(key, given)[0]
        ]

    def plan(self, answers: Mapping[str, Sequence[Answer]]) -> dict[str, int]:
        """What a run would do, given the answers that are there."""
        asked = [key for attempt in range(_ASKED_AT_MOST) for key in self.to_ask(answers, attempt)]
        size = sum(len(self.question(key).prompt.encode()) for key in asked)
        return {
            "passages that occur as a negative": sum(p.negative for p in self.passages.values()),
            "of these without a query": len(self.wanted),
            "answered before": sum(key in answers for key in self.wanted),
            "requests to make": len(asked),
            "tokens of their prompts, roughly": size // _BYTES_PER_TOKEN,
        }

    def ask(self, backend: Backend, journal: Journal) -> None:
        """Ask until each passage has a query, or has been asked about twice."""
        for attempt in range(_ASKED_AT_MOST):
            keys = self.to_ask(journal.answers, attempt)
            label = "ask" if attempt == 0 else "ask again"
            with tqdm(total=len(keys), desc=label, unit="passage", disable=not keys) as bar:

                def done(question: Question, answer: Answer | str, bar: tqdm = bar) -> None:
                    if isinstance(answer, str):
                        self.no_answer[question.key] = answer
                        bar.set_postfix({"without answer": len(self.no_answer)})
                    else:
                        journal.add(question.key, answer)
                    bar.update()

                backend.ask(map(self.question, keys), done)

    def outcome(self, answers: Mapping[str, Sequence[Answer]]) -> _Outcome:
        result = _Outcome()
        for key in self.wanted:
            queries, fault = self.read(key, answers.get(key, ()))
            if queries:
                result.queries[key] = queries
            else:
                result.failures[key] = self.no_answer.get(key) or fault or "not asked"
        return result

    def round_trip(self, result: _Outcome, encoder: Encoder, cache: Path) -> int:
        """Drop queries that do not find their passage; how many. ``cache``: folder for the passages' embeddings."""
        from clpl_moe.retrieval.search import search
        from clpl_moe.retrieval.store import encode_passages, encode_queries

        asked = [(key, query) for key, queries in result.queries.items() for query in queries]
        if not asked:
            return 0
        queries = encode_queries(encoder, [query for _, query in asked], self.encoding)
        searched = SearchedPassages(self.passages, self.corpus)
        passages = encode_passages(encoder, searched, self.encoding, cache=cache)
        _, ranked = search(queries.to(encoder.model.device), passages, self.arguments.round_trip_top)
        places = {key: place for place, key in enumerate(self.passages)}
        kept: dict[str, list[str]] = {}
        for (key, query), row in zip(asked, ranked.tolist()):
            if places[key] in row:
                kept.setdefault(key, []).append(query)
        for key in result.queries.keys() - kept.keys():
            result.failures[key] = f"round trip: passage not among the first {self.arguments.round_trip_top}"
        result.queries = kept
        return len(asked) - sum(map(len, kept.values()))

    def write(self, result: _Outcome) -> list[Path]:
        """Write the lines, the store and the failures; their paths."""
        found = {key: list(p.negative_queries.values()) for key, p in self.passages.items() if p.bare}
        output, store, failures = _outputs(self.arguments)
        by_id = [(i, queries) for key, queries in result.queries.items() for i in self.passages[key].ids]
        write_jsonl(store, ({"docid": identifier, "queries": queries} for identifier, queries in by_id))
        reasons = (
            {"ids": self.passages[key].ids, "reason": reason, "passage": self.passages[key].text}
            for key, reason in result.failures.items()
        )
        write_jsonl(failures, reasons)
        write_jsonl(output, fill_lines(self.files, found | result.queries, self.arguments.queries_per_passage))
        return [output, store, failures]


def _outputs(arguments: SynthesizeArguments) -> list[Path]:
    return [Path(arguments.output), arguments.beside("positive_queries"), arguments.beside("failures")]


def _open_backend(arguments: SynthesizeArguments, encoding: EncodingArguments) -> Backend:
    if arguments.backend == "transformers":
        from clpl_moe.synthesize.local import LocalModel

        return LocalModel(
            arguments.model,
            temperature=0.7 if arguments.temperature is None else arguments.temperature,
            max_answer_tokens=arguments.max_answer_tokens or 256,
            batch_size=arguments.concurrency,
            trust_remote_code=encoding.trust_remote_code,
        )
    from clpl_moe.synthesize.server import Server

    return Server(
        arguments.model,
        base_url=arguments.base_url,
        api_key_env=arguments.api_key_env,
        options=arguments.request_fields(),
        concurrency=arguments.concurrency,
        timeout=arguments.timeout,
        max_retries=arguments.max_retries,
    )


def _open_encoder(arguments: SynthesizeArguments, encoding: EncodingArguments) -> Encoder:
    from clpl_moe.encoder.lengths import check_lengths

    encoder = open_encoder(arguments.round_trip_model, encoding)
    check_lengths(encoder.model, encoding.query_max_len, encoding.passage_max_len)
    return encoder


def synthesize(arguments: SynthesizeArguments, encoding: EncodingArguments | None = None) -> None:
    """Run a job as :mod:`clpl_moe.synthesize` describes it, and print what came of it.

    Raises:
        UserError: a mistake in options or data, or a server that gives no answers. Answers stay in the journal.
    """
    encoding = encoding or EncodingArguments()
    journal_path = arguments.beside("journal")
    refuse_unwritable(journal_path)
    for path in _outputs(arguments):
        # Beside a journal, what lacks the output itself is of a run that was killed as it wrote.
        ours = path != Path(arguments.output) and journal_path.exists()
        refuse_existing(path, arguments.overwrite or ours)
    job = _Job(arguments, encoding)
    before = read_answers(journal_path, job.settings, arguments.overwrite)
    plan = job.plan(before)
    print_counts(plan)
    print(f"(a token is counted as {_BYTES_PER_TOKEN} bytes; a passage whose answer is of no use is asked about twice)")
    if arguments.dry_run:
        return
    backend = _open_backend(arguments, encoding) if plan["requests to make"] else None
    # Before answers are paid for, too: only a loaded one shows that it is whole, and what lengths it takes.
    encoder = _open_encoder(arguments, encoding) if arguments.round_trip_model else None
    with Journal(journal_path, job.settings, arguments.overwrite) as journal:
        try:
            if backend is not None:
                job.ask(backend, journal)
        except (UserError, KeyboardInterrupt) as error:
            kept = sum(map(len, journal.answers.values()))
            hint = f"{kept} answers are in {journal_path}: the same command goes on from there"
            if isinstance(error, UserError):
                raise UserError(f"{error}; {hint}") from None
            print(hint, file=sys.stderr)
            raise
        answers = journal.answers
    if job.no_answer and not any(key in answers for key in job.wanted):
        reason = Counter(job.no_answer.values()).most_common(1)[0][0]
        raise UserError(f"not one passage was answered, mostly: {reason}")
    result = job.outcome(answers)
    counts: dict[str, int] = {}
    if encoder is not None:
        from clpl_moe.retrieval.store import cache_folder

        with cache_folder(encoding, beside=Path(f"{arguments.output}.embeddings")) as cache:
            counts["queries dropped by the round trip"] = job.round_trip(result, encoder, cache)
            paths = job.write(result)
    else:
        paths = job.write(result)
    given = [answer for key in job.wanted for answer in answers.get(key, ())]
    new = len(given) - sum(len(before.get(key, ())) for key in job.wanted)
    reasons = Counter(reason.partition(": ")[0] for reason in result.failures.values())
    short = sum(len(queries) < arguments.queries_per_passage for queries in result.queries.values())
    counts = {
        "requests sent, retries included": backend.requests if backend else 0,
        "answers received, of this run": new,
        "answers received, of all runs": len(given),
        "tokens of prompts, of all runs": sum(answer.prompt_tokens for answer in given),
        "tokens of answers, of all runs": sum(answer.answer_tokens for answer in given),
        **counts,
        "queries written": sum(map(len, result.queries.values())),
        "passages with queries": len(result.queries),
        "of these with fewer than asked for": short,
        "of these without an id: not in the store": sum(not job.passages[key].ids for key in result.queries),
        "passages without a query": len(result.failures),
        **{f"  {reason}": count for reason, count in reasons.most_common()},
    }
    print()
    print_counts(counts)
    for path in paths:
        print(f"wrote {path}")
    if job.no_answer:
        print(f"{len(job.no_answer)} passages had no answer: the same command with --overwrite true asks these again")
