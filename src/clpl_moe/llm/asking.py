"""What a command does around its questions: the files, the bar, the journal, and what is said when it is stopped."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tqdm.auto import tqdm

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.common.files import resolved
from clpl_moe.data.formats import DataFile, data_files, entry_path
from clpl_moe.llm.backends import Answer, Backend, Question
from clpl_moe.llm.journal import Journal
from clpl_moe.llm.options import AskingArguments

ASKED_AT_MOST = 2  # times: once more where an answer is of no use

_BYTES_PER_TOKEN = 4  # of UTF-8: what tokenizers of large models need for English, Korean, Persian and Hindi, roughly

Answers = Mapping[str, Sequence[Answer]]  # by key of the question


def training_files(arguments: AskingArguments) -> list[DataFile]:
    """The files to read, among whose folders the output may not lie."""
    files = data_files(arguments.train_data)
    if resolved(arguments.output).parent in {resolved(entry_path(entry)) for entry in arguments.train_data}:
        where = f"{arguments.output} lies in a folder of train_data, every file of which is read as training data"
        raise OptionError("output", f"{where}; name another folder")
    return files


def estimate(questions: Iterable[Question]) -> dict[str, int]:
    """How many questions there are, and how long their prompts, for the plan."""
    count, size = 0, 0
    for question in questions:
        count, size = count + 1, size + len(question.prompt.encode())
    return {"requests to make": count, "tokens of their prompts, roughly": size // _BYTES_PER_TOKEN}


def ask(
    backend: Backend, questions: Iterable[Question], count: int, journal: Journal, attempt: int, unit: str
) -> dict[str, str]:
    """Ask ``count`` questions; each answer goes to the journal as it comes. Returns why others have none, by key."""
    no_answer: dict[str, str] = {}
    label = "ask" if attempt == 0 else "ask again"
    with tqdm(total=count, desc=label, unit=unit, disable=not count) as bar:

        def done(question: Question, answer: Answer | str) -> None:
            if isinstance(answer, str):
                no_answer[question.key] = answer
                bar.set_postfix({"without answer": len(no_answer)})
            else:
                journal.add(question.key, answer)
            bar.update()

        backend.ask(questions, done)
    return no_answer


@contextlib.contextmanager
def naming_the_journal(journal: Journal) -> Iterator[None]:
    """Say, where the asking ends early, that its answers are kept."""
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        kept = sum(map(len, journal.answers.values()))
        hint = f"{kept} answers are in {journal.path}: the same command goes on from there"
        if isinstance(error, UserError):
            raise UserError(f"{error}; {hint}") from None
        print(hint, file=sys.stderr)
        raise
