"""``python -m clpl_moe.validate FILE...``: every fault of training data, and what the data are like.

A fault is what training refuses a file for: both call :func:`clpl_moe.data.schema.check_line`. Of the lines without fault a
table shows

1. how many positives and negatives a query has, and how many negatives have queries;
2. what repeats: equal lines (in what training reads of them), equal queries with other positives, and negatives that
   equal a positive of their query, each by Unicode NFC and folded white space;
3. lengths, in tokens of a tokenizer with prompts and special tokens as in training, and what the limits cut off;
   without a tokenizer in characters;
4. the scripts of the letters, by Unicode's names.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clpl_moe.common.cli import parse
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import read_lines
from clpl_moe.data.schema import check_line, data_files, normalise
from clpl_moe.data.scripts import script_of
from clpl_moe.retrieval.collection import normalize_text

PROG = "clpl_moe.validate"
DESCRIPTION = "Show every fault of training data, and a table of what the data are like. Exit code 2 on faults."
KINDS = ("query", "pos", "neg", "neg_q")
_BLOCK = 1 << 20  # characters whose tokens and scripts are counted at once


@dataclass
class ValidateArguments:
    """Which files to look at, and how training will read them."""

    train_data: list[str] = field(
        default_factory=list, metadata={"help": "files or folders of training JSONL; without it, those of --config"}
    )
    config: str | None = field(
        default=None,
        metadata={"help": "YAML file of training: its data, limits, tokenizer, prompts and whether it needs scores"},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "model folder or hub name whose tokens are counted; without it, that of --config"},
    )
    query_max_len: int | None = field(
        default=None, metadata={"help": "longest query in tokens; without it, that of --config"}
    )
    passage_max_len: int | None = field(
        default=None, metadata={"help": "longest passage in tokens; without it, that of --config"}
    )
    knowledge_distillation: bool = field(
        default=False, metadata={"help": "expect pos_scores and neg_scores in every line, also without --config"}
    )
    max_faults: int = field(default=50, metadata={"help": "faults shown of each file; the rest is counted"})

    def __post_init__(self) -> None:
        if not self.train_data and self.config is None:
            raise UserError("no file to validate: name at least one file or folder of training JSONL, or a --config")
        for name, least in (("max_faults", 0), ("query_max_len", 3), ("passage_max_len", 3)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name}: found {value}, expected at least {least}")


@dataclass(frozen=True)
class Reading:
    """How training reads texts.

    Attributes:
        count: lengths of texts in tokens, special ones included; None: characters are counted.
        limits: kind of text -> longest length in tokens; None where it is not known.
        prompts: kind of text -> what is put in front of it.
        scores_required: whether each line must have teacher scores.
    """

    count: Callable[[list[str]], list[int]] | None = None
    limits: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(KINDS))
    prompts: dict[str, str] = field(default_factory=lambda: dict.fromkeys(KINDS, ""))
    scores_required: bool = False


class FileReport:
    """Figures of one file.

    Args:
        reading: how training reads its texts.

    Attributes:
        faults: number of faults.
        faulty_lines: number of lines that have some.
        examples: number of lines without fault; all that follows is of them.
        per_query: ``pos`` and ``neg`` -> how many of them each line has.
        answered: number of negatives with queries.
        repeats: name of a repetition -> how often.
        first: name of a repetition -> number of the first line with it.
        lengths: kind of text -> lengths of all texts of that kind.
        letters: kind of text -> script -> number of letters.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.faults = self.faulty_lines = self.examples = self.answered = 0
        self.per_query: dict[str, array] = {kind: array("I") for kind in ("pos", "neg")}
        self.repeats: Counter[str] = Counter()
        self.first: dict[str, int] = {}
        self.lengths: dict[str, array] = {kind: array("I") for kind in KINDS}
        self._known_lengths: dict[str, dict[int, int]] = {kind: {} for kind in KINDS}
        self._characters: dict[str, np.ndarray] = {kind: np.zeros(0, dtype=np.int64) for kind in KINDS}
        self._lines: set[int] = set()
        self._positives_of: dict[int, int] = {}
        self._texts: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self._waiting = 0

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Take in a line without faults."""
        example = normalise(record)
        self.examples += 1
        texts = {
            "query": [example["query"]],
            "pos": example["pos"],
            "neg": example["neg"],
            "neg_q": [query for queries in example["negative_queries"] for query in queries],
        }
        for kind, some in texts.items():
            self._texts[kind] += some
            self._waiting += sum(map(len, some))
        for kind, counts in self.per_query.items():
            counts.append(len(texts[kind]))
        self.answered += sum(map(bool, example["negative_queries"]))
        positives = frozenset(map(normalize_text, example["pos"]))
        own = sum(normalize_text(text) in positives for text in example["neg"])
        self._repeats("negatives that equal a positive", number, own)
        answered = map(tuple, example["negative_queries"])
        line = hash((*map(tuple, (*texts.values(), answered)), example["prompt"], example["type"]))
        self._repeats("equal lines", number, line in self._lines)
        self._lines.add(line)
        answers = hash(positives)
        other = self._positives_of.setdefault(hash(normalize_text(example["query"])), answers) != answers
        self._repeats("equal queries with other positives", number, other)
        if self._waiting >= _BLOCK:
            self.flush()

    def _repeats(self, name: str, number: int, times: int) -> None:
        self.repeats[name] += times
        if times:
            self.first.setdefault(name, number)

    def flush(self) -> None:
        """Count what was taken in since the last time; before the figures of texts are read."""
        for kind, texts in self._texts.items():
            self.lengths[kind].extend(self._measure(kind, texts))
            codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
            counts = np.bincount(codes, minlength=len(self._characters[kind]))
            counts[: len(self._characters[kind])] += self._characters[kind]
            self._characters[kind] = counts
            texts.clear()
        self._waiting = 0

    def _measure(self, kind: str, texts: list[str]) -> Iterable[int]:
        if self.reading.count is None:
            return map(len, texts)
        # Passages are negatives of many queries: each is cut into tokens once.
        known = self._known_lengths[kind]
        new = {key: text for text in texts if (key := hash(text)) not in known}
        if new:
            prompt = self.reading.prompts[kind]
            known.update(zip(new, self.reading.count([prompt + text for text in new.values()])))
        return (known[hash(text)] for text in texts)

    @property
    def letters(self) -> dict[str, Counter[str]]:
        return {kind: count_scripts(counts) for kind, counts in self._characters.items()}


def count_scripts(characters: np.ndarray) -> Counter[str]:
    """Script -> number of letters, of how often each code point occurs (an array that they index)."""
    scripts: Counter[str] = Counter()
    for code in np.flatnonzero(characters):
        if script := script_of(chr(code)):
            scripts[script] += int(characters[code])
    return scripts


def validate_file(path: str | Path, reading: Reading, tell: Callable[[str], None]) -> FileReport:
    """Check one file to its end.

    Args:
        path: a file of training JSONL.
        reading: how training reads it.
        tell: called with each fault, as ``file:line: field: what was found, what is expected``.

    Raises:
        UserError: the file is missing, empty or cannot be read.
    """
    path, report = Path(path), FileReport(reading)
    size = path.stat().st_size if path.is_file() else None
    with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, delay=2) as bar:
        for number, _, raw in read_lines(path):
            record, faults = check_line(number, raw, scores_required=reading.scores_required)
            for fault in faults:
                tell(f"{at(path, number)}: {fault}")
            report.faults += len(faults)
            report.faulty_lines += bool(faults)
            if record is not None and not faults:
                report.add(number, record)
            bar.update(len(raw))
        report.flush()
    return report


def table(report: FileReport) -> Iterator[str]:
    """The figures of a file, line by line."""
    negatives = sum(report.per_query["neg"])
    figures = {"examples": f"{report.examples:,}", "faults": f"{report.faults:,}"}
    if report.faults:
        figures["faults"] += f" in {report.faulty_lines:,} lines, which the rest of this table leaves out"
    if report.examples:
        for kind, name in (("pos", "positives"), ("neg", "negatives")):
            counts = np.array(report.per_query[kind])
            figures[f"{name} per query"] = f"{counts.min():,} to {counts.max():,}, mean {counts.mean():.1f}"
        figures["negatives with queries"] = f"{_share(report.answered, negatives)} of {negatives:,}"
        for name in ("equal lines", "equal queries with other positives", "negatives that equal a positive"):
            first = f", first in line {report.first[name]:,}" if name in report.first else ""
            figures[name] = f"{report.repeats[name]:,}{first}"
    width = max(map(len, figures))
    yield from (f"  {name:<{width}}  {value}" for name, value in figures.items())
    if not report.examples:
        return
    unit = "characters" if report.reading.count is None else "tokens"
    letters = report.letters
    rows = [
        ["texts", "number", f"{unit}: mean", "median", "95%", "longest", "limit", "cut", "tokens cut off", "scripts"]
    ]
    for kind in KINDS:
        lengths, limit = np.array(report.lengths[kind], dtype=np.int64), report.reading.limits[kind]
        if not len(lengths):
            rows.append([kind, "0", *["-"] * 8])
            continue
        cut = ["-", "-", "-"] if limit is None else [f"{limit:,}", "?", "?"]
        if limit is not None and report.reading.count is not None:
            over = np.maximum(lengths - limit, 0)
            cut[1:] = [f"{_share(np.count_nonzero(over), len(over))}", _share(over.sum(), lengths.sum())]
        total = letters[kind].total()
        scripts = [f"{name} {_share(count, total)}" for name, count in letters[kind].most_common(4)]
        median, high = np.percentile(lengths, [50, 95])
        figures = [f"{lengths.mean():.1f}", f"{median:.0f}", f"{high:.0f}", f"{lengths.max():,}"]
        rows.append([kind, f"{len(lengths):,}", *figures, *cut, ", ".join(scripts) or "no letters"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    yield ""
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:-1], widths[1:-1])]
        yield f"  {row[0]:<{widths[0]}}  {'  '.join(cells)}  {row[-1]}"


def _share(part: int, whole: int) -> str:
    if not whole:
        return "0%"
    percent = 100 * part / whole
    # What is there is not shown as nothing, nor what is nearly all as all.
    return f"{percent:.0f}%" if percent in (0, 100) else f"{min(max(percent, 0.1), 99.9):.1f}%"


def open_reading(arguments: ValidateArguments) -> tuple[list[str], Reading]:
    """Paths of the data and how training would read them.

    Raises:
        UserError: the config is one that training refuses, or the tokenizer cannot be loaded.
    """
    if arguments.config is None:
        limits = (arguments.query_max_len, arguments.passage_max_len)
        prompts, count = ("", ""), None
        if arguments.tokenizer is not None:
            from clpl_moe.encoder.settings import read_settings

            settings = read_settings(arguments.tokenizer)
            prompts = (settings.query_prompt, settings.passage_prompt)
            count = load_counter(arguments.tokenizer)
        return arguments.train_data, _reading(count, limits, prompts, arguments.knowledge_distillation)
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
    from clpl_moe.train.settings import resolve_settings

    # Nothing is written: the folder only has to be named.
    argv = ["--config", arguments.config, "--output_dir", "none"]
    for name in ("query_max_len", "passage_max_len", "tokenizer"):
        if getattr(arguments, name) is not None:
            argv += [f"--{'tokenizer_name' if name == 'tokenizer' else name}", str(getattr(arguments, name))]
    argv += ["--train_data", *arguments.train_data] if arguments.train_data else []
    model, data, training = parse([CLPLModelArguments, CLPLDataArguments, CLPLTrainingArguments], PROG, "", argv)
    settings = resolve_settings(model, data, training)
    hub = {"cache_dir": model.cache_dir, "token": model.token, "trust_remote_code": model.trust_remote_code}
    try:
        count = load_counter(model.tokenizer_name or model.model_name_or_path, **hub)
    except UserError as error:
        if arguments.tokenizer is not None:
            raise
        print(f"{error}; lengths are in characters (--tokenizer names another)", file=sys.stderr)
        count = None
    limits = (data.query_max_len, data.passage_max_len)
    required = data.knowledge_distillation or arguments.knowledge_distillation
    return data.train_data, _reading(count, limits, (settings.query_prompt, settings.passage_prompt), required)


def _reading(count, limits: tuple[int | None, int | None], prompts: tuple[str, str], required: bool) -> Reading:
    is_passage = [kind in ("pos", "neg") for kind in KINDS]
    return Reading(
        count,
        {kind: limits[passage] for kind, passage in zip(KINDS, is_passage)},
        {kind: prompts[passage] for kind, passage in zip(KINDS, is_passage)},
        required,
    )


def load_counter(name: str, **hub: Any) -> Callable[[list[str]], list[int]]:
    """A function that counts tokens of texts, special ones included, as a model's tokenizer makes them.

    Raises:
        UserError: there is no such tokenizer, or it cannot be reached.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    except Exception as error:  # the tokenizers library raises plain ones
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{at(name)}: the tokenizer cannot be loaded ({reason})") from None

    def count(texts: list[str]) -> list[int]:
        return list(map(len, tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]))

    return count


def validate(arguments: ValidateArguments) -> int:
    """Print faults (to stderr) and a table of each file; returns the number of faults.

    Raises:
        UserError: the options cannot be used.
    """
    paths, reading = open_reading(arguments)
    faults = 0
    for path in paths:
        try:
            files = data_files([path])
        except UserError as error:
            print(error, file=sys.stderr)
            faults += 1
            continue
        for file in files:
            shown = 0

            def tell(message: str) -> None:
                nonlocal shown
                shown += 1
                if shown <= arguments.max_faults:
                    print(message, file=sys.stderr)

            try:
                report = validate_file(file, reading, tell)
            except UserError as error:
                print(error, file=sys.stderr)
                faults += 1
                continue
            if shown > arguments.max_faults:
                rest = shown - arguments.max_faults
                print(f"{at(file)}: {rest:,} more faults; --max_faults shows more of them", file=sys.stderr)
            faults += report.faults
            print(f"{file}\n" + "\n".join(table(report)) + "\n")
    return faults
