"""Options of ``synthesize``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clpl_moe.common.errors import OptionError
from clpl_moe.retrieval.collection import check_language


@dataclass
class SynthesizeArguments:
    """Which passages get queries, who writes them, and what is kept."""

    train_data: list[str] = field(metadata={"help": "training JSONL files, or folders of them, as mine writes them"})
    output: str = field(
        metadata={"help": "JSONL file to write; its journal, store and failures get names that begin with its name"}
    )
    language: str = field(metadata={"help": "language of passages and queries, such as ko"})
    model: str = field(
        metadata={"help": "name of the language model; with backend transformers its folder or hub name"}
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
        default=None, metadata={"help": "not given: the server's own; 0.7 with backend transformers"}
    )
    max_answer_tokens: int | None = field(
        default=None, metadata={"help": "longest answer; not given: the server's own; 256 with backend transformers"}
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
        metadata={"help": "collection whose passages are searched, too; not given: only those of train_data"},
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
                raise OptionError(name, f"found {value}, expected at least {least}")
        if not self.timeout > 0:
            raise OptionError("timeout", f"found {self.timeout}, expected more than 0")
        check_language(self.language)
        if self.round_trip_collection and not self.round_trip_model:
            raise OptionError("round_trip_collection", "needs round_trip_model, the encoder that searches it")
        if self.backend == "transformers":
            for name in ("base_url", "api_key_env", "request_options"):
                if getattr(self, name) is not None:
                    raise OptionError(name, "is for backend server")
        self.request_fields()

    def request_fields(self) -> dict[str, Any]:
        """The fields of a request besides model and messages."""
        try:
            fields = json.loads(self.request_options or "{}")
            json.dumps(fields, allow_nan=False)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise OptionError("request_options", f"found {self.request_options!r}, expected a JSON object")
        given = {"temperature": self.temperature, "max_tokens": self.max_answer_tokens}
        return {name: value for name, value in given.items() if value is not None} | fields

    def beside(self, what: str) -> Path:
        """The path of what is written beside the output: ``train.jsonl`` has ``train.journal.jsonl``."""
        output = Path(self.output)
        return output.with_name(f"{output.name.removesuffix('.jsonl')}.{what}.jsonl")
