"""README and docs as tests read them: code blocks, links, tables, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/clpl-moe/clpl-moe"
SITE = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*SITE, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md"]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, first line in the page, and why it is not run, if so."""

    language: str
    text: str
    line: int
    not_run: str | None


def name(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    """The fenced blocks of a language, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        marker = _NOT_RUN.search(text[: match.start()])
        line = text[: match.start(2)].count("\n") + 1
        found.append(Block(match[1], match[2], line, marker[1] if marker else None))
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks; lines keep their numbers."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[str]:
    """Targets of the page's links and pictures."""
    for match in re.finditer(r"\]\(([^)\s]+)\)", prose(page)):
        yield match[1]


def anchors(page: Path) -> set[str]:
    """What links to the page's headings can name."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", re.sub(r"\]\([^)]*\)", "", heading)).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in words}


def table_options(page: Path) -> Iterator[str]:
    """Options that tables with the first heading ``option`` list, without those of an ellipsis."""
    rows = None
    for line in prose(page).splitlines():
        if not line.startswith("|"):
            rows = None
        elif rows is None:
            rows = line.startswith("| option |")
        elif rows:
            yield from re.findall(r"`(\w+)`", line.split("|")[1])


def commands(page: Path) -> Iterator[tuple[int, str, list[str]]]:
    """The commands of the package in blocks of shell and in backticks: line, verb, words behind it."""
    for block in blocks(page, "bash"):
        lines = block.text.replace("\\\n", "  ")
        for number, line in enumerate(lines.splitlines()):
            yield from _commands(block.line + number, line)
    for number, line in enumerate(prose(page).splitlines(), start=1):
        for span in re.findall(r"`([^`]+)`", line):
            yield from _commands(number, span)


def _commands(number: int, line: str) -> Iterator[tuple[int, str, list[str]]]:
    line = re.sub(r"^> |&&.*$", "", line)
    match = re.search(r"(?:^|\s)(?:clpl-moe|-m clpl_moe\.?)[ ]?(\w+)(.*)$", line)
    if match and match[1] not in ("VERB", "COMMAND"):
        words = shlex.split(match[2], comments=True)
        yield number, match[1], [word for word in words if word not in ("&", "…")]
