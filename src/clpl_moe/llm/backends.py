"""Who is asked, a server or a local model; the question, and the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from clpl_moe.llm.options import AskingArguments


class Question(NamedTuple):
    """What is asked, and the key by which its answer is found again."""

    key: str
    prompt: str
    schema: dict[str, Any] | None = None  # JSON schema of the answer, which some servers keep to


@dataclass(frozen=True)
class Answer:
    """What came back."""

    text: str | None  # None: nothing that can be read
    cut: bool = False  # whether it ended at its limit of tokens
    prompt_tokens: int = 0  # 0 where neither server nor tokenizer counted
    answer_tokens: int = 0


Done = Callable[[Question, Answer | str], None]


class Backend(Protocol):
    """Who is asked."""

    requests: int  # so far, retries included

    def ask(self, questions: Iterable[Question], done: Done) -> None:
        """Ask everything, in order and several at once, and hand over each answer, or why there is none, as it comes.

        :class:`UserError` where nothing more will come: wrong key, no such model, no server, no memory.
        """


def open_backend(arguments: AskingArguments, trust_remote_code: bool) -> Backend:
    """The backend that the options name; raises :class:`UserError` where it cannot be used."""
    if arguments.backend == "transformers":
        from clpl_moe.llm.local import LocalModel

        return LocalModel(arguments, trust_remote_code)
    from clpl_moe.llm.server import Server

    return Server(arguments)
