"""The plan of an evaluation: which model is ranked on which collection, and where the results go.

Results are known by content: a task's key holds hashes of weights and collection, and the settings. Equal content is not
computed again; other content in the same folder is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe.common.errors import OptionError, UserError, at
from clpl_moe.common.files import are_numbers, is_text, read_json, refuse_unwritable
from clpl_moe.common.output import Output
from clpl_moe.evaluate.metrics import DENSE, M3_SCORES, run_file
from clpl_moe.evaluate.options import EvaluateArguments
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments, choose_or_refuse, open_encoder

if TYPE_CHECKING:
    from clpl_moe.encoder import Encoder

METRICS_FILE = "metrics.json"
M3_FILE = "metrics.m3.json"
QRELS_FILE = "qrels.trec"
_NAMES = ("collection", "collection_hash", "split")
_FIGURES = ("recall", "sample", "lists", "lists_searched")  # of a search in an approximate index


@dataclass
class Task:
    """One model on one collection, ranked by its embeddings or, from that ranking's first passages, by BGE-M3's heads."""

    model: str
    label: str
    collection: Collection
    folder: Path
    key: dict[str, Any]
    heads: bool = False

    @property
    def file(self) -> Path:
        """The file of metrics; it vouches for the run files beside it."""
        return self.folder / (M3_FILE if self.heads else METRICS_FILE)

    @property
    def runs(self) -> dict[str, Path]:
        """Kind of score -> run file."""
        return {score: self.folder / run_file(score) for score in (M3_SCORES if self.heads else (DENSE,))}

    @property
    def names(self) -> dict[str, str]:
        """Names and places, which may have changed since the results were computed."""
        return {
            "model": self.model,
            "language": self.collection.language,
            "split": self.collection.split,
            "collection": str(self.collection.directory),
        }

    def finished(self) -> dict[str, Any] | None:
        """The content of the file of metrics; None where a result is missing."""
        whole = all(path.is_file() for path in (self.file, *self.runs.values()))
        return read_result(self.file) if whole else None

    @property
    def files(self) -> list[Path]:
        """All files of the task; that of metrics, which is written last, vouches for the others."""
        # Of scores that came from the run of the embeddings, nothing is left when that is made anew.
        judged = [] if self.heads else [QRELS_FILE, run_file(DENSE), M3_FILE]
        return [self.file, *(self.folder / name for name in (*judged, *map(run_file, M3_SCORES)))]

    def refuse_other_results(self) -> None:
        """Raise :class:`UserError` where results of something else, or files of others, are in the way."""
        remedy = "name another output, or set overwrite to replace it"
        if self.file.exists():
            try:
                found = read_result(self.file)
            except UserError as damaged:
                raise UserError(f"{damaged}; {remedy}") from None
            if differing := [name for name in self.key if found.get(name) != self.key[name]]:
                other = f"holds results of something else (other {', '.join(differing)})"
                raise UserError(f"{at(self.file)}: {other}; {remedy}")
        for path in () if self.file.exists() else self.files:
            if path.exists():
                raise UserError(f"{at(path)}: a file without {self.file.name} beside it is in the way; {remedy}")

    @contextlib.contextmanager
    def writing(self, output: Output) -> Iterator[None]:
        """A block that writes the task's files, that of metrics last; their place is cleared before."""
        with output.unfinished(*self.files):
            for path in self.files:
                path.unlink(missing_ok=True)
            yield


class CurrentEncoder:
    """Loads encoders by name, and holds one at a time in memory. The expert that is asked for is that of those with router
    given."""

    def __init__(self, encoding: EncodingArguments, revisions: Mapping[str, str | None]) -> None:
        self.encoding, self.revisions = encoding, revisions
        self._name = ""
        self._encoder: Encoder | None = None

    def open(self, name: str) -> Encoder:
        from clpl_moe.moe.inject import takes_expert

        if self._encoder is None or self._name != name:
            self._encoder = None
            encoding = dataclasses.replace(self.encoding, expert=None)
            self._encoder, self._name = open_encoder(name, encoding, self.revisions[name]), name
            if self.encoding.expert is not None and takes_expert(self._encoder):
                choose_or_refuse(self._encoder, self.encoding.expert, where=f"{name}: ")
        return self._encoder


def plan_tasks(
    collections: Mapping[str, Collection], arguments: EvaluateArguments, current: CurrentEncoder
) -> list[Task]:
    """All that is to be ranked, models outermost; raises :class:`UserError` where a task cannot be done."""
    from clpl_moe.encoder.settings import check_lengths
    from clpl_moe.moe.inject import takes_expert
    from clpl_moe.retrieval.store import process

    encoding = current.encoding
    named: dict[tuple[str, ...], str] = {}
    for name in arguments.model:  # two spellings of one folder are one model
        named.setdefault(_parts(name), name)
    models = list(named.values())
    tasks, without = [], []
    for model, label in zip(models, model_labels(models), strict=True):
        encoder = current.open(model)
        check_lengths(encoder.model, encoding.query_max_len, encoding.passage_max_len, model)
        if encoding.expert is not None and not takes_expert(encoder):
            without.append(model)
        model_hash = encoder.fingerprint()
        heads_hash = _hash_heads(model, encoder, current.revisions[model]) if arguments.m3_scores else None
        for language, collection in collections.items():
            folder = Path(arguments.output, label if len(models) > 1 else "", language)
            settings = encoding.describe(encoder) | encoding.describe_search()
            settings |= {"top_k": arguments.top_k, "metrics": list(arguments.metrics)}
            key = {"model_hash": model_hash, "collection_hash": collection.fingerprint(), "settings": settings}
            tasks.append(Task(model, label, collection, folder, key))
            if heads_hash is not None:
                settings = settings | {"rerank_top": arguments.rerank_top, "m3_weights": arguments.m3_weights}
                key = key | {"settings": settings, "heads_hash": heads_hash}
                tasks.append(Task(model, label, collection, folder, key, heads=True))
    if len(without) == len(models):
        raise OptionError("expert", f"{', '.join(models)}: no experts with router given, of which one could be chosen")
    if process()[0] == 0:
        for model in without:
            print(f"{model}: no experts with router given; it is evaluated without expert", file=sys.stderr)
    for task in tasks:
        refuse_unwritable(task.file)
        if not arguments.overwrite:
            task.refuse_other_results()
    return tasks


def model_labels(models: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, with as many parts before it as make all names differ."""
    parts = [_parts(name) for name in models]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["_".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label}_{number}" for number, label in enumerate(labels, 1)]


def _parts(name: str) -> tuple[str, ...]:
    return Path(name).resolve().parts[1:] or ("root",) if Path(name).exists() else tuple(name.split("/"))


def _hash_heads(model: str, encoder: Encoder, revision: str | None) -> str | None:
    """None where the model lacks heads."""
    from clpl_moe.evaluate.m3 import load_heads
    from clpl_moe.retrieval.store import process

    heads = load_heads(model, encoder.model.config.hidden_size, revision=revision)
    if heads is not None:
        return heads.fingerprint()
    if process()[0] == 0:
        message = "no sparse_linear.pt and colbert_linear.pt; it is evaluated by its dense embeddings only"
        print(f"{model}: {message}", file=sys.stderr)
    return None


def read_result(path: Path) -> dict[str, Any]:
    """The content of a ``metrics.json``; raises :class:`UserError` where there is none of ``clpl_moe.evaluate``."""
    try:
        content = read_json(path, dict)
    except OSError:
        raise UserError(f"{at(path)}: no such file; expected results of clpl_moe.evaluate") from None
    except UserError:
        content = {}
    if _is_result(content, path.name == M3_FILE):
        return content
    raise UserError(f"{at(path)}: not the results of clpl_moe.evaluate")


def _is_result(content: dict[str, Any], of_heads: bool) -> bool:
    """Whether all that is read again is there, and of a search that is not exact what the tables show of it."""
    metrics, settings = content.get("metrics"), content.get("settings")
    each = metrics.values() if of_heads and isinstance(metrics, dict) else [metrics]
    if not all(map(are_numbers, each)) or not all(is_text(content.get(name)) for name in _NAMES):
        return False
    if of_heads or not isinstance(settings, dict):
        return True
    if "quantize" in settings:
        return are_numbers(content.get("exact_metrics"), metrics or ()) and are_numbers(content.get("bytes"))
    if "index" in settings:
        about = content.get("approximate")
        return (
            isinstance(about, dict)
            and are_numbers({name: about.get(name) for name in _FIGURES})
            and are_numbers(about.get("seconds"))
        )
    return True
