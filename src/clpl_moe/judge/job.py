"""One job: the questions, the verdicts in their answers, and the files that come of it."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clpl_moe.common.files import write_jsonl
from clpl_moe.data.schema import training_lines
from clpl_moe.judge.answers import Verdict, answer_schema, read_verdicts
from clpl_moe.judge.options import JudgeArguments
from clpl_moe.judge.pairs import Pair, Query, add_queries, key_of, read_queries, relabel
from clpl_moe.judge.scores import Scores
from clpl_moe.llm.answers import find_fault
from clpl_moe.llm.asking import ASKED_AT_MOST, Answers, ask, estimate, training_files
from clpl_moe.llm.backends import Backend, Question
from clpl_moe.llm.journal import Format, Journal
from clpl_moe.llm.prompts import fill_prompt, load_prompt

PROMPTS = Path(__file__).with_name("prompts.yaml")
PROMPTS_WITH_QUERIES = Path(__file__).with_name("prompts_with_queries.yaml")
JOURNAL = Format("clpl_moe.judge 1", "question")
_EXAMPLES = 3  # of each kind


class Example(NamedTuple):
    """A verdict that changes a line."""

    what: str
    query: str
    passage: str


class Job:
    """One run: the questions, and what their answers hold."""

    def __init__(self, arguments: JudgeArguments) -> None:
        self.arguments = arguments
        self.files = training_files(arguments)
        own = PROMPTS_WITH_QUERIES if arguments.write_queries else PROMPTS
        path = own if arguments.prompts is None else Path(arguments.prompts)
        self.prompt = load_prompt(path, arguments.language, ["query", "passages"])
        self.settings = arguments.settings(self.prompt, write_queries=arguments.write_queries)
        self.queries: dict[str, Query] = {}
        self.found: Counter[str] = Counter()  # in the files
        self.verdicts: dict[Pair, Verdict] = {}
        self.asked: Counter[Pair] = Counter()  # answers that were to hold a verdict
        self.faults: dict[Pair, str] = {}  # of the last such answer without one
        self.no_answer: dict[str, str] = {}  # questions to which none came, with the reason

    def read(self, scores: Scores | None) -> None:
        """Read the files."""
        self.queries, self.found = read_queries(self.files, self.arguments, scores)

    def pairs(self) -> Iterator[Pair]:
        """All that is to be judged."""
        for query, found in self.queries.items():
            for passage in found.passages:
                yield Pair(query, passage)

    def take(self, answers: Answers) -> None:
        """Take the verdicts from all answers so far; of each pair the first."""
        self.verdicts, self.asked, self.faults = {}, Counter(), {}
        for key, given in answers.items():
            pairs = _pairs_of(key)
            for answer in given:
                verdicts = read_verdicts(answer.text, len(pairs), answer.cut)
                fault = "cut off" if answer.cut else "no verdict in the answer"
                for number, pair in enumerate(pairs, 1):
                    self.asked[pair] += 1
                    if number in verdicts:
                        self.verdicts.setdefault(pair, verdicts[number])
                    else:
                        self.faults[pair] = "reply not readable" if answer.text is None else fault

    def to_ask(self, attempt: int) -> list[str]:
        """Keys of the questions about pairs with ``attempt`` answers so far, none of them with a verdict."""
        keys = []
        size = self.arguments.passages_per_question
        for query, found in self.queries.items():
            pairs = (Pair(query, passage) for passage in found.passages)
            left = [p.passage for p in pairs if p not in self.verdicts and self.asked[p] == attempt]
            # A model must not take the place for a sign: files have the most similar first.
            left.sort(key=lambda passage: _digest(f"{self.arguments.seed} {query} {passage}"))
            keys += [f"{query}:{','.join(left[i : i + size])}" for i in range(0, len(left), size)]
        return keys

    def question(self, key: str) -> Question:
        """What is asked about the passages that a key names."""
        query = self.queries[key.partition(":")[0]]
        texts = [query.passages[pair.passage].text for pair in _pairs_of(key)]
        shown = (f"<passage {number}>\n{text}\n</passage {number}>" for number, text in enumerate(texts, 1))
        prompt = fill_prompt(self.prompt, query=query.text, passages="\n".join(shown))
        return Question(key, prompt, answer_schema(self.arguments.write_queries))

    def plan(self, answers: Answers) -> dict[str, int]:
        """What a run would do, given the answers that are there."""
        self.take(answers)
        pairs = list(self.pairs())
        asked = itertools.chain.from_iterable(map(self.to_ask, range(ASKED_AT_MOST)))
        doubtful = {} if self.arguments.ask == "all" else {"of these doubtful": self.found["doubtful negatives"]}
        return {
            "lines": self.found["lines"],
            "negatives": self.found["negatives"],
            **doubtful,
            "passages to judge, each once for its query": len(pairs),
            "judged before": sum(pair in self.verdicts for pair in pairs),
            **estimate(map(self.question, asked)),
        }

    def ask(self, backend: Backend, journal: Journal) -> None:
        """Ask until each pair has a verdict, or has been asked about twice."""
        for attempt in range(ASKED_AT_MOST):
            self.take(journal.answers)
            keys = self.to_ask(attempt)
            self.no_answer |= ask(backend, map(self.question, keys), len(keys), journal, attempt, "question")
        self.take(journal.answers)

    def reasons(self) -> dict[Pair, str]:
        """Why pairs have no verdict."""
        unanswered = {pair: reason for key, reason in self.no_answer.items() for pair in _pairs_of(key)}
        without = (pair for pair in self.pairs() if pair not in self.verdicts)
        return {pair: unanswered.get(pair) or self.faults.get(pair, "not asked") for pair in without}

    def examples(self) -> list[Example]:
        """Some of the verdicts that change lines."""
        found: dict[str, list[Example]] = {}
        whats = {"yes": ("neg", "a negative that answers"), "partly": ("neg", "a negative that answers in part")}
        whats["no"] = ("pos", "a positive that does not answer")
        for pair in self.pairs():
            if (verdict := self.verdicts.get(pair)) is not None:
                query, (name, what) = self.queries[pair.query], whats[verdict.answers]
                if name in query.passages[pair.passage].was:
                    found.setdefault(what, []).append(Example(what, query.text, query.passages[pair.passage].text))
        return [example for some in found.values() for example in some[:_EXAMPLES]]

    def count(self, answers: Answers, before: int, done: Counter[str]) -> dict[str, int]:
        """Figures of the job, by name; ``before`` answers were there, and ``done`` was done with the lines."""
        given = [answer for some in answers.values() for answer in some]
        labels = Counter(self.verdicts[pair].answers for pair in self.pairs() if pair in self.verdicts)
        reasons = Counter(reason.partition(": ")[0] for reason in self.reasons().values())
        return {
            "answers received, of this run": len(given) - before,
            "answers received, of all runs": len(given),
            "tokens of prompts, of all runs": sum(answer.prompt_tokens for answer in given),
            "tokens of answers, of all runs": sum(answer.answer_tokens for answer in given),
            "passages that answer": labels["yes"],
            "passages that answer in part": labels["partly"],
            "passages that do not answer": labels["no"],
            "passages without a verdict, kept where they were": reasons.total(),
            **{f"  {reason}": count for reason, count in reasons.most_common()},
            **dict(sorted(done.items())),
        }

    def write(self, done: Counter[str]) -> list[Path]:
        """Write lines and verdicts; ``done`` gets what was done with the lines. Their paths."""
        output, verdicts = output_paths(self.arguments)
        reasons = self.reasons()
        write_jsonl(verdicts, (self._verdict(pair, reasons) for pair in self.pairs()))
        write_jsonl(output, self._lines(done))
        return [output, verdicts]

    def _verdict(self, pair: Pair, reasons: dict[Pair, str]) -> dict[str, Any]:
        query = self.queries[pair.query]
        passage, verdict = query.passages[pair.passage], self.verdicts.get(pair)
        found = {"answers": verdict.answers} if verdict else {"answers": None, "reason": reasons[pair]}
        return {"query": query.text, **found, "was": sorted(passage.was), "ids": passage.ids, "passage": passage.text}

    def _lines(self, done: Counter[str]) -> Iterator[dict[str, Any]]:
        for _, record in training_lines(self.files):
            key = key_of(record["query"])
            query = self.queries[key]
            given = {p: v for p in query.passages if (v := self.verdicts.get(Pair(key, p))) is not None}
            changed = relabel(record, query, given, self.arguments.answering, done)
            if self.arguments.write_queries:
                done["queries written for negatives"] += add_queries(changed, self._usable(query, given))
            if not changed["pos"]:
                done["lines left out: no positive is left"] += 1
            else:
                done["lines written"] += 1
                done["lines written without a negative"] += not changed.get("neg")
                yield changed

    def _usable(self, query: Query, verdicts: dict[str, Verdict]) -> dict[str, Verdict]:
        """The verdicts whose written queries pass the checks of ``synthesize``."""
        language, most = self.arguments.language, self.arguments.max_query_chars
        return {
            key: verdict
            for key, verdict in verdicts.items()
            if verdict.query and find_fault(verdict.query, query.passages[key].text, language, most) is None
        }


def output_paths(arguments: JudgeArguments) -> list[Path]:
    """Paths of the lines and of the verdicts."""
    return [Path(arguments.output), arguments.beside("verdicts")]


def _pairs_of(key: str) -> Sequence[Pair]:
    """The query and passages that the key of a question names, in the order in which they are shown."""
    query, _, passages = key.partition(":")
    return [Pair(query, passage) for passage in passages.split(",")]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
