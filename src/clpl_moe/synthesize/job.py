"""One job: which passages are asked about, what their answers hold, and the files that come of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from clpl_moe.common.errors import OptionError, UserError, at
from clpl_moe.common.files import write_jsonl
from clpl_moe.common.yaml_files import load_yaml
from clpl_moe.data.schema import data_files
from clpl_moe.retrieval.collection import load_passages
from clpl_moe.synthesize.answers import read_queries
from clpl_moe.synthesize.backends import Answer, Backend, Question
from clpl_moe.synthesize.journal import Journal
from clpl_moe.synthesize.options import SynthesizeArguments
from clpl_moe.synthesize.passages import fill_lines, read_passages

PROMPTS = Path(__file__).with_name("prompts.yaml")
_PLACEHOLDERS = ("passage", "queries")
_ASKED_AT_MOST = 2
_BYTES_PER_TOKEN = 4  # of UTF-8: what tokenizers of large models need for English, Korean, Persian and Hindi, roughly

Answers = Mapping[str, Sequence[Answer]]  # by key of the passage


def load_prompt(language: str, path: str | Path | None = None) -> str:
    """The prompt for a language, else the ``generic`` one, of a YAML file whose prompts are all checked; None: of the
    package's own."""
    path = PROMPTS if path is None else Path(path)
    prompts = load_yaml(path)
    for name, prompt in prompts.items():
        if not isinstance(name, str):  # such as no, which YAML takes for false
            raise UserError(f"{at(path)}: found {name!r}, expected the name of a language; put it into quotes")
        place = at(path, field=name)
        if not isinstance(prompt, str):
            raise UserError(f"{place}: found a {type(prompt).__name__}, expected the prompt's text")
        if "{passage}" not in prompt:
            raise UserError(f"{place}: the prompt has no {{passage}}, the place of the passage")
        for placeholder in re.findall(r"\{(\w+)\}", prompt):
            if placeholder not in _PLACEHOLDERS:
                raise UserError(f"{place}: found {{{placeholder}}}, expected {{passage}} or {{queries}}")
    for name in (language, "generic"):
        if name in prompts:
            return prompts[name]
    raise UserError(f"{at(path)}: no prompt for '{language}' and no 'generic' one; the file has {', '.join(prompts)}")


def fill(prompt: str, passage: str, queries: int) -> str:
    """A prompt with a passage put into it; braces of the passage mean nothing."""
    return prompt.replace("{queries}", str(queries)).replace("{passage}", passage)


class Job:
    """One run: the questions, and what their answers hold; passages have their keys."""

    def __init__(self, arguments: SynthesizeArguments) -> None:
        self.arguments = arguments
        self.files = data_files(arguments.train_data)
        if Path(arguments.output).resolve().parent in {Path(path).resolve() for path in arguments.train_data}:
            where = f"{arguments.output} lies in a folder of train_data, every file of which is read as training data"
            raise OptionError("output", f"{where}; name another folder")
        self.prompt = load_prompt(arguments.language, arguments.prompts)
        given = {name: getattr(arguments, name) for name in ("backend", "model", "language", "queries_per_passage")}
        # What decides the questions, for the journal.
        self.settings = {**given, "prompt": self.prompt, "request": arguments.request_fields()}
        if arguments.revision is not None:
            self.settings["revision"] = arguments.revision
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
