"""Who writes the queries: a server or a local model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.synthesize.journal import Answer, Question
from clpl_moe.synthesize.options import SynthesizeArguments


class Backend(Protocol):
    """Who is asked: a server or a local model."""

    requests: int

    def ask(self, questions: Iterable[Question], done: Callable[[Question, Answer | str], None]) -> None:
        """Ask everything; hand over each answer, or why there is none, as it comes."""


def open_backend(arguments: SynthesizeArguments, encoding: EncodingArguments) -> Backend:
    """The backend that the options name; raises :class:`UserError` where it cannot be used."""
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
