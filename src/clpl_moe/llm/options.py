"""The options of commands that ask a language model about training data."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from clpl_moe.common.errors import OptionError
from clpl_moe.common.files import parse_json
from clpl_moe.common.options import check_bounds, check_needs, option
from clpl_moe.retrieval.collection import check_language

_LEAST_TEMPERATURE = 1e-3  # what is divided by less overflows


@dataclass
class AskingArguments:
    """Which files, which language model, how it is asked, and what is written."""

    # What a local model takes where the options say nothing.
    local_temperature: ClassVar[float] = 0.7
    local_answer_tokens: ClassVar[int] = 256

    train_data: list[str] = option("files or folders of training data, as mine writes them, or hub:NAME")
    output: str = option("JSONL file to write; its journal and other files get names that begin with its name")
    language: str = option("language of passages and queries, such as ko")
    model: str = option("name of the language model; with backend transformers its folder or hub name")
    revision: str | None = option("commit, branch or tag of a model on the hub; not given: the newest", None)
    backend: Literal["server", "transformers"] = option(
        "an OpenAI-compatible server, or a model on this machine", "server"
    )
    base_url: str | None = option("address of the server, such as http://localhost:8000/v1; not given: OpenAI's", None)
    api_key_env: str | None = option("environment variable that holds the key; not given: OPENAI_API_KEY", None)
    prompts: str | None = option("YAML file, language: prompt, as the package's own, which is used otherwise", None)
    temperature: float | None = option(
        "not given: the server's own; 0.7 with backend transformers", None, least=0, most=100
    )
    max_answer_tokens: int | None = option(
        "longest answer; not given: the server's own; 256 with backend transformers", None, least=1, most=1_000_000
    )
    request_options: str | None = option("further fields of each request to the server, a JSON object", None)
    concurrency: int = option("requests at once, or prompts a batch", 8, least=1, most=1_000_000_000)
    timeout: float = option("seconds to wait for an answer", 120.0, most=86_400)
    max_retries: int = option(
        "tries after a rate limit, server error, time-out or cut connection", 8, least=0, most=1_000
    )
    dry_run: bool = option("print what would be asked, and stop", False)
    overwrite: bool = option("replace the output files, and a journal of other settings", False)

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.timeout > 0:
            raise OptionError("timeout", f"found {self.timeout}, expected more than 0")
        if self.temperature is not None and 0 < self.temperature < _LEAST_TEMPERATURE:
            raise OptionError("temperature", f"found {self.temperature}, expected 0 or at least {_LEAST_TEMPERATURE}")
        check_language(self.language)
        if Path(self.output).name in ("", ".."):
            raise OptionError("output", f"found {self.output!r}, expected the name of a file")
        of_server = ("base_url", "api_key_env", "request_options", "timeout", "max_retries")
        check_needs(self, {"revision": "backend transformers", **dict.fromkeys(of_server, "backend server")})
        self.request_fields()

    def request_fields(self) -> dict[str, Any]:
        """The fields of a request besides model and messages."""
        try:
            fields = parse_json((self.request_options or "{}").encode())
            json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()  # half characters fit into no file
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

    def settings(self, prompt: str, **own: Any) -> dict[str, Any]:
        """What decides an answer besides the question, for the journal; ``own`` are further settings of a command."""
        given = {name: getattr(self, name) for name in ("backend", "model", "language")} | own
        settings = {**given, "prompt": prompt, "request": self.request_fields()}
        return settings if self.revision is None else settings | {"revision": self.revision}

    def beside(self, what: str) -> Path:
        """The path of what is written beside the output: ``train.jsonl`` has ``train.journal.jsonl``."""
        output = Path(self.output)
        return output.with_name(f"{output.name.removesuffix('.jsonl')}.{what}.jsonl")


# The name of a field without all that is no letter: OPENAI_API_KEY, Ocp-Apim-Subscription-Key, clientSecret.
_SECRET = re.compile(
    r".*(api|access|private|secret|subscription|account|client)key|.*(secret|password|passwd|authorization|credentials?)"
    r"|.*(access|auth|api|bearer|hf|hub|session|refresh|id)token|token|auth|bearer|cookie"
)


def _secret_field(value: Any) -> str | None:
    """The first name of a field, at any depth, that stands for a key."""
    if isinstance(value, dict):
        return next((n for n in value if _SECRET.fullmatch(re.sub("[^a-z]", "", n.lower()))), None) or _secret_field(
            list(value.values())
        )
    if isinstance(value, list):
        return next((found for v in value if (found := _secret_field(v)) is not None), None)
    return None
