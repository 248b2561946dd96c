"""The journal of a job: each answer of a language model, on disk before anything is done with it.

A JSONL file. The first line holds the settings that decide what is asked; the journal continues a job with the same
settings only. Each further line is one answer.
"""

from __future__ import annotations

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from clpl_moe.common.compressed import refuse_no_file
from clpl_moe.common.errors import UserError, at, shorten
from clpl_moe.common.files import parse_line
from clpl_moe.llm.backends import Answer


class Format(NamedTuple):
    """How a command marks its journals, and what it calls the key of an answer."""

    name: str
    key: str


def read_journal(
    path: Path, form: Format, settings: dict[str, Any], overwrite: bool
) -> tuple[dict[str, list[Answer]], int]:
    """The answers that a job with these settings goes on from, by key, and where the last whole line ends; none where there
    is no journal yet."""
    if not path.exists():
        return {}, 0
    refuse_no_file(path)
    found: dict[str, Any] = {}
    answers: dict[str, list[Answer]] = {}
    end, begin = 0, json.dumps({"journal": form.name})[:-1].encode()
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):  # of a job that was killed as it wrote, or whose disk was full
                if number == 1 and not (raw.startswith(begin) or begin.startswith(raw)):
                    raise UserError(f"{at(path, number)}: found another file, expected a journal; name another output")
                break
            end += len(raw)
            record = parse_line(path, number, raw)
            try:
                if number == 1:
                    if record["journal"] != form.name:
                        raise KeyError
                    found = dict(record["settings"])
                else:
                    key = record.pop(form.key)
                    if not isinstance(key, str):
                        raise TypeError
                    answers.setdefault(key, []).append(_answer(record))
            except (KeyError, TypeError, ValueError):
                expected = "an answer" if number > 1 else f'"journal": "{form.name}" and its settings'
                raise UserError(f"{at(path, number)}: found {', '.join(record) or '{}'}, expected {expected}") from None
    if end == 0 or found == settings:
        return answers, end
    if overwrite:
        return {}, 0
    parts = []
    for name in (name for name in {**found, **settings} if found.get(name) != settings.get(name)):
        was, now = (shorten(json.dumps(s.get(name), ensure_ascii=False), 60) for s in (found, settings))
        parts.append(f"{name} was {was}, now {now}" if name != "prompt" else "prompt")
    raise UserError(
        f"{at(path)}: the journal holds answers to other settings ({'; '.join(parts)}); name another output, or"
        " set overwrite to throw these answers away"
    )


def _answer(record: dict[str, Any]) -> Answer:
    answer = Answer(**record)
    counts = (answer.prompt_tokens, answer.answer_tokens)
    if not isinstance(answer.text, str | None) or not isinstance(answer.cut, bool):
        raise TypeError
    if any(type(count) is not int or count < 0 for count in counts):
        raise TypeError
    return answer


class Journal:
    """The open journal of a running job, which has it to itself, with the answers of all runs. A context manager.

    With ``overwrite`` a journal of other settings is emptied; without, it raises :class:`UserError`.
    """

    def __init__(self, path: Path, form: Format, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.path, self._form = path, form
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._sync = ThreadPoolExecutor(1)
        try:
            self.answers, end = read_journal(path, form, settings, overwrite)
            self._file.truncate(end)
            if end == 0:
                self._write({"journal": form.name, "settings": settings})
        except BaseException:
            self._close()
            raise

    def add(self, key: str, answer: Answer) -> None:
        """Write an answer. It outlives the process when this returns, and a loss of power a few milliseconds later."""
        self._write({self._form.key: key, **dataclasses.asdict(answer)})
        self.answers.setdefault(key, []).append(answer)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        # Aside: answers that come in meanwhile must not wait to be written, or a kill would lose them.
        self._sync.submit(os.fsync, self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        self._sync.shutdown()
        self._file.close()
