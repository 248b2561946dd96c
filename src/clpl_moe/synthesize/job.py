"""One job: which passages are asked about, what their answers hold, and the files that come of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clpl_moe.common.files import write_jsonl
from clpl_moe.llm import prompts
from clpl_moe.llm.answers import read_queries
from clpl_moe.llm.asking import ASKED_AT_MOST, Answers, ask, estimate, training_files
from clpl_moe.llm.backends import Answer, Backend, Question
from clpl_moe.llm.journal import Format, Journal
from clpl_moe.retrieval.collection import load_passages
from clpl_moe.synthesize.options import SynthesizeArguments
from clpl_moe.synthesize.passages import fill_lines, read_passages

PROMPTS = Path(__file__).with_name("prompts.yaml")
JOURNAL = Format("clpl_moe.synthesize 1", "passage")


def load_prompt(language: str, path: str | Path | None = None) -> str:
    """The prompt for a language (:func:`clpl_moe.llm.prompts.load_prompt`); None: of the package's own file."""
    return prompts.load_prompt(PROMPTS if path is None else Path(path), language, ["passage"], ["queries"])


def fill(prompt: str, passage: str, queries: int) -> str:
    """A prompt with a passage put into it."""
    return prompts.fill_prompt(prompt, passage=passage, queries=str(queries))


class Job:
    """One run: the questions, and what their answers hold; passages have their keys."""

    def __init__(self, arguments: SynthesizeArguments) -> None:
        self.arguments = arguments
        self.files = training_files(arguments)
        self.prompt = load_prompt(arguments.language, arguments.prompts)
        self.settings = arguments.settings(self.prompt, queries_per_passage=arguments.queries_per_passage)
        # Further passages that the round trip searches, checked before answers are paid for.
        self.corpus: Sequence[str] = ()
        if arguments.round_trip_collection:
            self.corpus = load_passages(arguments.round_trip_collection, arguments.language)
        if arguments.round_trip_model:
            from clpl_moe.encoder.load import read_config

            read_config(arguments.round_trip_model, revision=arguments.round_trip_revision)
        self.passages = read_passages(self.files)
        if not arguments.known_queries:
            for passage in self.passages.values():
                passage.negative_queries.clear()
        self.wanted = {key: p for key, p in self.passages.items() if p.bare and not p.negative_queries}
        self.queries: dict[str, list[str]] = {}  # the usable ones
        self.failures: dict[str, str] = {}  # why other passages have none
        self.no_answer: dict[str, str] = {}  # of these, why no answer came at all

    def question(self, key: str) -> Question:
        """What is asked about a passage."""
        return Question(key, fill(self.prompt, self.wanted[key].text, self.arguments.queries_per_passage))

    def read(self, key: str, answers: Sequence[Answer]) -> tuple[list[str], str | None]:
        """The usable queries of a passage's answers, or what is wrong with the last of these."""
        given = self.arguments
        how: dict[str, Any] = {"wanted": given.queries_per_passage, "max_chars": given.max_query_chars}
        fault = None
        for answer in answers:
            if answer.text is None:
                fault = "reply not readable"
                continue
            passage = self.wanted[key].text
            queries, fault = read_queries(answer.text, passage, language=given.language, cut=answer.cut, **how)
            if queries:
                return queries, None
        return [], fault

    def to_ask(self, answers: Answers, attempt: int) -> list[str]:
        """Passages with ``attempt`` answers so far, none of them of use."""
        given = {key: answers.get(key, ()) for key in self.wanted}
        return [key for key, some in given.items() if len(some) == attempt and not self.read(key, some)[0]]

    def plan(self, answers: Answers) -> dict[str, int]:
        """What a run would do, given the answers that are there."""
        asked = [key for attempt in range(ASKED_AT_MOST) for key in self.to_ask(answers, attempt)]
        return {
            "passages that occur as a negative": sum(p.negative for p in self.passages.values()),
            "of these without a query": len(self.wanted),
            "answered before": sum(key in answers for key in self.wanted),
            **estimate(map(self.question, asked)),
        }

    def ask(self, backend: Backend, journal: Journal) -> None:
        """Ask until each passage has a query, or has been asked about twice."""
        for attempt in range(ASKED_AT_MOST):
            keys = self.to_ask(journal.answers, attempt)
            self.no_answer |= ask(backend, map(self.question, keys), len(keys), journal, attempt, "passage")

    def take(self, answers: Answers) -> None:
        """Take the usable queries from the answers, and for the other passages the reason."""
        for key in self.wanted:
            queries, fault = self.read(key, answers.get(key, ()))
            if queries:
                self.queries[key] = queries
            else:
                self.failures[key] = self.no_answer.get(key) or fault or "not asked"

    def count(self, answers: Answers, before: Answers, dropped: Mapping[str, int]) -> dict[str, int]:
        """Figures of the job, by name, with those that the round trip ``dropped``."""
        given = [answer for key in self.wanted for answer in answers.get(key, ())]
        new = len(given) - sum(len(before.get(key, ())) for key in self.wanted)
        reasons = Counter(reason.partition(": ")[0] for reason in self.failures.values())
        short = sum(len(queries) < self.arguments.queries_per_passage for queries in self.queries.values())
        return {
            "answers received, of this run": new,
            "answers received, of all runs": len(given),
            "tokens of prompts, of all runs": sum(answer.prompt_tokens for answer in given),
            "tokens of answers, of all runs": sum(answer.answer_tokens for answer in given),
            **dropped,
            "queries written": sum(map(len, self.queries.values())),
            "passages with queries": len(self.queries),
            "of these with fewer than asked for": short,
            "of these without an id: not in the store": sum(not self.passages[key].ids for key in self.queries),
            "passages without a query": len(self.failures),
            **{f"  {reason}": count for reason, count in reasons.most_common()},
        }

    def write(self) -> list[Path]:
        """Write the lines, the store and the failures; their paths."""
        found = {key: list(p.negative_queries.values()) for key, p in self.passages.items() if p.bare}
        output, store, failures = output_paths(self.arguments)
        by_id = [(i, queries) for key, queries in self.queries.items() for i in self.passages[key].ids]
        write_jsonl(store, ({"docid": identifier, "queries": queries} for identifier, queries in by_id))
        reasons = [(self.passages[key], reason) for key, reason in self.failures.items()]
        write_jsonl(failures, ({"ids": p.ids, "reason": reason, "passage": p.text} for p, reason in reasons))
        write_jsonl(output, fill_lines(self.files, found | self.queries, self.arguments.queries_per_passage))
        return [output, store, failures]


def output_paths(arguments: SynthesizeArguments) -> list[Path]:
    """Paths of the filled lines, of the new queries by passage id, and of the failures."""
    return [Path(arguments.output), arguments.beside("positive_queries"), arguments.beside("failures")]
