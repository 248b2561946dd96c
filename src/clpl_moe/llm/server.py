"""Asking an OpenAI-compatible server: OpenAI's own, Gemini's endpoint, vLLM, Ollama and others.

Requests go through the ``openai`` package, which retries rate limits, server errors, time-outs and cut connections with
back-off, and waits as long as ``Retry-After`` says (up to two minutes; what is to wait longer fails).
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from clpl_moe.common.errors import OptionError, UserError, shorten
from clpl_moe.llm.backends import Answer, Done, Question
from clpl_moe.llm.options import AskingArguments

try:
    import openai
except ImportError:
    raise UserError(
        'asking a server needs the openai package: pip install "clpl-moe[synthesize]"'
        " (or set backend to transformers for a local model)"
    ) from None

_NO_KEY = "none"  # what is sent to a server that needs no key: the package insists on one
_DEFAULT_KEY = "OPENAI_API_KEY"
_SCHEMA_REFUSED = (400, 415, 422, 500, 501)  # what servers answer that have no response_format, or not this one
_SHORTEST_PART = 6  # characters of a key that are hidden in messages
_SHORTEST_KEY = 8  # characters; those of a server without keys of its own, such as "x" or "token", are no secret


class Server:
    """A server and how it is asked; :class:`UserError` where the key is missing, or the address is none."""

    def __init__(self, arguments: AskingArguments) -> None:
        self._arguments, self._fields, self._base_url = arguments, arguments.request_fields(), arguments.base_url
        if self._base_url is not None:
            _check_url(self._base_url)
        needed = self._base_url is None and "OPENAI_BASE_URL" not in os.environ
        self._key = _read_key(arguments.api_key_env, needed)
        self.requests = 0
        self._reached = False  # whether it has answered anything at all
        self._well = False  # whether it has given an answer
        self._failed_in_a_row = 0
        self._at_once = 0  # requests
        self._keeps_schemas: bool | None = None  # whether it takes a JSON schema for the answer; None: not known yet

    def ask(self, questions: Iterable[Question], done: Done) -> None:
        """See :class:`Backend`."""
        asyncio.run(self._ask(questions, done))

    async def _ask(self, questions: Iterable[Question], done: Done) -> None:
        server = self

        class Connection(openai.DefaultAsyncHttpxClient):
            async def send(self, *args, **kwargs):
                server.requests += 1
                try:
                    response = await super().send(*args, **kwargs)
                except Exception as error:
                    if type(error).__name__ == "ConnectError" and not server._reached:
                        # Not as an error that the package would retry for a minute: nobody is there.
                        raise openai.OpenAIError(f"no server at {server._base_url or 'that address'}") from None
                    raise
                server._reached = True
                return response

        remaining = iter(questions)

        async def work(first: Question) -> None:
            for question in itertools.chain([first], remaining):
                done(question, await self._ask_one(client, question))

        async with openai.AsyncOpenAI(
            base_url=self._base_url,
            api_key=self._key,
            timeout=self._arguments.timeout,
            max_retries=self._arguments.max_retries,
            http_client=Connection(),
        ) as client:
            # Not more than there are questions.
            firsts = list(itertools.islice(remaining, self._arguments.concurrency))
            self._at_once = len(firsts)
            tasks = [asyncio.create_task(work(first)) for first in firsts]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_one(self, client: Any, question: Question, plainly: bool = False) -> Answer | str:
        messages = [{"role": "user", "content": question.prompt}]
        fields = self._fields
        if question.schema is not None and not plainly and self._keeps_schemas is not False:
            fields = fields if "response_format" in fields else fields | _schema_field(question.schema)
        try:
            # The raw reply: whatever is in it, it has been paid for.
            reply = await client.chat.completions.with_raw_response.create(
                model=self._arguments.model, messages=messages, extra_body=fields
            )
        except openai.APIStatusError as error:
            status = error.status_code
            if fields is not self._fields and self._keeps_schemas is not True and status in _SCHEMA_REFUSED:
                return await self._ask_one(client, question, plainly=True)
            said = f"HTTP {status}: {_short(error, self._hide)}"
            if status in (401, 402, 404) or (status == 403 and not self._well):
                raise UserError(f"the server refuses the requests: {said}") from None
            # Others may concern one passage: too long, or not to the taste of a filter.
            return self._failed(said, alone=self._well and status < 500 and status not in (408, 409, 429))
        except openai.APITimeoutError:
            return self._failed(f"no answer within {self._arguments.timeout:g} s")
        except openai.APIConnectionError as error:
            return self._failed(f"the connection broke ({type(error.__cause__).__name__})")
        except openai.OpenAIError as error:
            raise UserError(_short(error, self._hide)) from None
        answer = _read_reply(reply.text, self._hide_in_data)
        if answer.text is None:
            # Kept as an answer, since it may have been paid for; but a row of them means a wrong address.
            self._failed("the replies are no chat completions")
        else:
            self._well, self._failed_in_a_row = True, 0
            if question.schema is not None and self._keeps_schemas is None:
                self._keeps_schemas = not plainly
        return answer

    def _failed(self, reason: str, alone: bool = False) -> str:
        """Count a failure; ``alone``: it says nothing about other questions."""
        self._failed_in_a_row += not alone
        limit = 2 * max(self._at_once, 8)
        if self._failed_in_a_row >= limit:
            raise UserError(f"the server has not given an answer {limit} times in a row, lastly: {reason}")
        return reason

    def _hide(self, text: str) -> str:
        """Text of the server's without the key, which some send back: whole, in part, in other letters or in base64."""
        if self._key == _NO_KEY:
            return text
        if len(self._key) < _SHORTEST_KEY:  # as a word of its own only: it may stand in others
            return re.sub(rf"(?<!\w){re.escape(self._key)}(?!\w)", "[key]", text)
        return _without(text, [self._key.lower(), *_in_base64(self._key)])

    def _hide_in_data(self, text: str) -> str:
        """An answer without the key. A short one, or one within a word, may well be a word of the answer itself."""
        if len(self._key) < _SHORTEST_KEY:
            return text
        return re.sub(rf"(?<![A-Za-z0-9_-]){re.escape(self._key)}(?![A-Za-z0-9_-])", "[key]", text)


def _schema_field(schema: dict[str, Any]) -> dict[str, Any]:
    form = {"name": "answer", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


def _check_url(base_url: str) -> None:
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        valid = False
    if not valid:
        raise OptionError("base_url", "expected an address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise OptionError("base_url", "holds a user name, password or query; the key belongs in the environment")


def _in_base64(key: str) -> list[str]:
    """A key in base64, in lower case; what stands before it, such as a user name, decides on one of three forms."""
    forms = []
    for before in range(3):
        text = base64.b64encode(b" " * before + key.encode()).decode().rstrip("=")
        # Characters at the ends depend on what stands beside the key.
        forms.append(text[-(-before * 8 // 6) : len(text) - 1].lower())
    return forms


def _without(text: str, secrets: list[str]) -> str:
    """A text without any part of a secret of at least six characters; the secrets are in lower case."""
    kept: list[str] = []
    lower, at = "".join(c.lower() if len(c.lower()) == 1 else c for c in text), 0  # as long as the text
    while at < len(text):
        longest = 0
        for secret in secrets:
            length = min(_SHORTEST_PART, len(text) - at)
            while length > longest and at + length <= len(text) and lower[at : at + length] in secret:
                longest, length = length, length + 1
        if longest >= _SHORTEST_PART:
            if kept[-1:] != ["[key]"]:
                kept.append("[key]")
            at += longest
        else:
            kept.append(text[at])
            at += 1
    return "".join(kept)


def _read_key(name: str | None, needed: bool) -> str:
    # The messages do not repeat the name: it may be the key itself, by mistake.
    key = os.environ.get(name or _DEFAULT_KEY, "").strip()
    if not key:
        if name is not None:
            raise OptionError("api_key_env", "the environment has no variable of this name, or an empty one")
        if needed:
            raise UserError(f"no key in the environment: export {_DEFAULT_KEY}=…, or name its variable in api_key_env")
        return _NO_KEY
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UserError("the key in the environment holds white space or letters that no key has")
    return key


def _short(error: Exception, hide: Callable[[str], str]) -> str:
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return shorten(hide(" ".join(str(message or error).split())), 300)  # hidden first: of a key, half is too much


def _read_reply(reply: str, hide: Callable[[str], str]) -> Answer:
    """A chat completion as an :class:`Answer`, its text None where the reply is something else."""
    try:
        record = json.loads(reply)
        choice = record["choices"][0]
        text = choice["message"].get("content") or ""
        # Half a surrogate pair fits into no file.
        text = hide(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        cut = choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Answer(None)
    usage = record.get("usage")
    counts = [usage.get(n) if isinstance(usage, dict) else 0 for n in ("prompt_tokens", "completion_tokens")]
    # As the journal takes them.
    return Answer(text, cut, *(count if type(count) is int and count >= 0 else 0 for count in counts))
