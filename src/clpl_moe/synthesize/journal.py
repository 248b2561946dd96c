"""The journal of a job: each answer of a language model, on disk before anything is done with it.

A JSONL file. The first line holds the settings that decide what is asked; the journal continues a job with the same
settings only. Each further line is one answer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import parse_line

if sys.platform != "win32":
    import fcntl

_FORMAT = "clpl_moe.synthesize 1"


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
        key: of the passage.
        prompt: with the passage in it.
    """

    key: str
    prompt: str


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: what the model wrote; None where the reply held nothing that can be read.
        cut: whether it ended at its limit of tokens.
        prompt_tokens: counted by the server or tokenizer; 0 where that did not count.
        answer_tokens: likewise.
    """

    text: str | None
    cut: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[str, list[Answer]], int]:
    """Settings, answers of each passage, and where the last whole line ends."""
    settings: dict[str, Any] | None = None
    answers: dict[str, list[Answer]] = {}
    end = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                break  # of a job that was killed as it wrote, or whose disk was full
            end += len(raw)
            record = parse_line(path, number, raw)
            try:
                if number == 1:
                    if record["journal"] != _FORMAT:
                        raise KeyError
                    settings = dict(record["settings"])
                else:
                    answers.setdefault(record.pop("passage"), []).append(Answer(**record))
            except (KeyError, TypeError, ValueError):
                expected = "an answer" if number > 1 else f'"journal": "{_FORMAT}" and its settings'
                raise UserError(f"{at(path, number)}: found {', '.join(record) or '{}'}, expected {expected}") from None
    return settings, answers, end


def _refuse_other(path: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    different = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
    if not different:
        return
    parts = []
    for name in different:
        short = [json.dumps(s.get(name), ensure_ascii=False) for s in (found, settings)]
        parts.append(f"{name} was {_shorten(short[0])}, now {_shorten(short[1])}" if name != "prompt" else "prompt")
    raise UserError(
        f"{at(path)}: the journal holds answers to other settings ({'; '.join(parts)}); name another output, or"
        " set overwrite to throw these answers away"
    )


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def read_answers(path: str | Path, settings: dict[str, Any], overwrite: bool = False) -> dict[str, list[Answer]]:
    """The answers that a job with these settings would not ask for again, by passage; leaves the file as it is.

    Raises:
        UserError: as :class:`Journal`.
    """
    path = Path(path)
    if not path.exists():
        return {}
    found, answers, _ = _read(path)
    if found is None or (overwrite and found != settings):
        return {}
    _refuse_other(path, found, settings)
    return answers


class Journal:
    """The open journal of a running job, which no second job can open. A context manager.

    Args:
        path: made where it does not exist.
        settings: what decides the questions, JSON values.
        overwrite: whether a journal of other settings may be emptied.

    Attributes:
        answers: by passage, those of earlier runs and those added.

    Raises:
        UserError: the journal belongs to other settings or to a job that runs, or is none.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        self._sync = ThreadPoolExecutor(1)
        try:
            if sys.platform != "win32":  # there, two jobs on one journal are not kept apart
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"{at(path)}: another job is writing to this journal; wait for it") from None
            found, self.answers, end = _read(self.path)
            if found is not None and found != settings:
                if not overwrite:
                    _refuse_other(self.path, found, settings)
                found, self.answers, end = None, {}, 0
            self._file.truncate(end)
            if found is None:
                self._write({"journal": _FORMAT, "settings": settings})
        except BaseException:
            self._close()
            raise

    def add(self, key: str, answer: Answer) -> None:
        """Write an answer. It outlives the process when this returns, and a loss of power a few milliseconds later."""
        self._write({"passage": key, **dataclasses.asdict(answer)})
        self.answers.setdefault(key, []).append(answer)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        # Aside: answers that come in meanwhile must not wait to be written, or a kill would lose them.
        self._sync.submit(os.fsync, self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        self._sync.shutdown()
        self._file.close()
