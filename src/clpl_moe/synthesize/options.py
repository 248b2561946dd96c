"""Options of ``synthesize``; those of encoding stand in :mod:`clpl_moe.retrieval.options`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clpl_moe.common.errors import OptionError
from clpl_moe.common.options import check_bounds, option
from clpl_moe.retrieval.collection import check_language


@dataclass
class SynthesizeArguments:
    """Which passages get queries, who writes them, and what is kept."""

    train_data: list[str] = option("training JSONL files, or folders of them, as mine writes them")
    output: str = option("JSONL file to write; its journal, store and failures get names that begin with its name")
    language: str = option("language of passages and queries, such as ko")
    model: str = option("name of the language model; with backend transformers its folder or hub name")
    revision: str | None = option("commit, branch or tag of a model on the hub; not given: the newest", None)
    backend: Literal["server", "transformers"] = option(
        "an OpenAI-compatible server, or a model on this machine", "server"
    )
    base_url: str | None = option("address of the server, such as http://localhost:8000/v1; not given: OpenAI's", None)
    api_key_env: str | None = option("environment variable that holds the key; not given: OPENAI_API_KEY", None)
    queries_per_passage: int = option("queries for each passage", 1, least=1, most=1_000)
    known_queries: bool = option(
        "do not ask about a passage that has queries elsewhere in the files, but use these", True
    )
    prompts: str | None = option("YAML file, language: prompt with {passage}; not given: the package's own", None)
    temperature: float | None = option(
        "not given: the server's own; 0.7 with backend transformers", None, least=0, most=100
    )
    max_answer_tokens: int | None = option(
        "longest answer; not given: the server's own; 256 with backend transformers", None, least=1, most=1_000_000
    )
    request_options: str | None = option("further fields of each request to the server, a JSON object", None)
    concurrency: int = option("requests at once, or passages a batch", 8, least=1)
    timeout: float = option("seconds to wait for an answer", 120.0, most=86_400)
    max_retries: int = option(
        "tries after a rate limit, server error, time-out or cut connection", 8, least=0, most=1_000
    )
    max_query_chars: int = option("a query of more characters is not used", 200, least=2, most=1_000_000)
    round_trip_model: str | None = option(
        "encoder that has to find the passage by its query; not given: no such check", None
    )
    round_trip_revision: str | None = option("as revision, of that encoder", None)
    round_trip_top: int = option("ranks in which it has to be found", 20, least=1, most=100_000_000)
    round_trip_collection: str | None = option(
        "collection whose passages are searched, too; not given: only those of train_data", None
    )
    dry_run: bool = option("print what would be asked, and stop", False)
    overwrite: bool = option("replace the output files, and a journal of other settings", False)

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.timeout > 0:
            raise OptionError("timeout", f"found {self.timeout}, expected more than 0")
        check_language(self.language)
        if Path(self.output).name in ("", ".."):
            raise OptionError("output", f"found {self.output!r}, expected the name of a file")
        if self.round_trip_collection and not self.round_trip_model:
            raise OptionError("round_trip_collection", "needs round_trip_model, the encoder that searches it")
        if self.round_trip_revision and not self.round_trip_model:
            raise OptionError("round_trip_revision", "needs round_trip_model, the encoder that it is of")
        if self.backend == "server" and self.revision is not None:
            raise OptionError("revision", "is for backend transformers")
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
            raise OptionError("request_options", "expected a JSON object")  # not repeated: it may hold a key
        if (name := _secret_field(fields)) is not None:
            fault = (
                f"holds {name!r}, which would stand in the journal; the key belongs in the environment (api_key_env)"
            )
            raise OptionError("request_options", fault)
        given = {"temperature": self.temperature, "max_tokens": self.max_answer_tokens}
        return {name: value for name, value in given.items() if value is not None} | fields

    def beside(self, what: str) -> Path:
        """The path of what is written beside the output: ``train.jsonl`` has ``train.journal.jsonl``."""
        output = Path(self.output)
        return output.with_name(f"{output.name.removesuffix('.jsonl')}.{what}.jsonl")


_SECRET = re.compile(
    r"(x[-_])?(api[-_]?key|authorization|(access|auth|api|bearer)[-_]?token|token|secret|password)", re.I
)


def _secret_field(value: Any) -> str | None:
    """The first name of a field, at any depth, that stands for a key."""
    if isinstance(value, dict):
        return next((n for n in value if _SECRET.fullmatch(n)), None) or _secret_field(list(value.values()))
    if isinstance(value, list):
        return next((found for v in value if (found := _secret_field(v)) is not None), None)
    return None
