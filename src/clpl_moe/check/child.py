"""The process in which :mod:`clpl_moe.check` runs the calls of one tool, as its users have it: nothing else is loaded.

Reads ``{"texts": {name: [text]}, "calls": {name: code}}`` from standard input; the last argument names the file that gets
``{name: {"queries": [[number]], "passages": [[number]]} | {"fault": text}}``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def _numbers(vectors: Any) -> list[list[float]]:
    return [[float(number) for number in vector] for vector in vectors]


def _run(code: str, texts: dict[str, list[str]]) -> dict[str, Any]:
    space: dict[str, Any] = {**texts, "__name__": "__main__"}
    try:
        exec(code, space)
        return {name: _numbers(space[name]) for name in ("queries", "passages")}
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Run the calls one after another, each with names of its own."""
    given = json.load(sys.stdin)
    found = {name: _run(code, given["texts"]) for name, code in given["calls"].items()}
    Path(sys.argv[-1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
