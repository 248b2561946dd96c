"""Files that are damaged in every way, and commands that meet them, for property tests."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

ODD = [
    *(None, True, False, 0, -1, 1.5, 1e308, 10**30, "", " ", "x", "\0", "../x", "=1+1", "p1", "q1", "a b", "é" * 3000),
    *([], [1], ["x"], [None], [[]], {}, {"a": 1}, [["x", 2]], {"text": "x"}),
]
# What json.dumps does not write.
RAW = ["NaN", "-Infinity", "1" * 6000, "[" * 3000 + "]" * 3000, '"\\ud800"', "nul", '"\n"', '{"a": 1, "a": 2}', "'x'"]


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """JSON lines, one of which has another value, or bytes of which are lost, doubled or replaced."""
    kind = draw(st.sampled_from(["value", "value", "value", "raw", "lost field", "line", "cut", "bytes", "empty"]))
    lines = content.splitlines(keepends=True)
    if kind == "empty":
        return draw(st.sampled_from([b"", b"\n\n", b"\xef\xbb\xbf", b"[]\n", b"null\n", b"{}\n", b"\x1f\x8b\x08\x00"]))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if kind == "bytes":
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 5)))
        return content[:start] + draw(st.binary(max_size=5)) + content[end:]
    number = draw(st.integers(0, len(lines) - 1))
    if kind == "line":
        changed = draw(st.sampled_from([b"", lines[number] * 2, *(json.dumps(odd).encode() + b"\n" for odd in ODD)]))
        return b"".join([*lines[:number], changed, *lines[number + 1 :]])
    record = json.loads(lines[number])
    name = draw(st.sampled_from(sorted(record)))
    if kind == "lost field":
        del record[name]
        text = json.dumps(record)
    elif kind == "value":
        text = json.dumps(_with(draw, record, name))
    else:
        mark = "a mark of its own"
        text = json.dumps(record | {name: mark}).replace(f'"{mark}"', draw(st.sampled_from(RAW)))
    return b"".join([*lines[:number], text.encode() + b"\n", *lines[number + 1 :]])


def _with(draw, record: dict[str, Any], name: str) -> dict[str, Any]:
    """A record whose field, or one in that field, has an odd value."""
    value = record[name]
    if isinstance(value, dict) and value and draw(st.booleans()):
        return record | {name: _with(draw, value, draw(st.sampled_from(sorted(value))))}
    return record | {name: draw(st.sampled_from(ODD))}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below one, with the bytes of files."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


def ends_well(main: Callable[[list[str]], Any], argv: list[Any]) -> int:
    """The exit code of a command, which must be 0, or 2 with one message."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([*map(str, argv)])
            code = 0
        except SystemExit as stop:
            code = stop.code
    text = said.getvalue()
    assert code in (0, 2), text
    assert "Traceback" not in text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code == 2), text
    if code == 2:
        assert text.splitlines()[-1].startswith("error: ")
    return code
