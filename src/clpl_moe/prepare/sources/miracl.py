"""MIRACL (Zhang et al. 2023, https://doi.org/10.1162/tacl_a_00595): passages of Wikipedia, queries and judgements by
native speakers, in 18 languages.

Its files are read as they are: the data sets' loading scripts no longer run in ``datasets``. They come from the hub
or from a folder that holds them, in the repositories' own folders or all in one:

- ``miracl-corpus-v1.0-ko/docs-0.jsonl.gz`` and so on: ``docid``, ``title``, ``text``;
- ``miracl-v1.0-ko/topics/topics.miracl-v1.0-ko-dev.tsv``: query id, text;
- ``miracl-v1.0-ko/qrels/qrels.miracl-v1.0-ko-dev.tsv``: query id, Q0, passage id, relevance (1, or 0: judged and found
  not relevant).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from clpl_moe.common.errors import OptionError, UserError, at, no_such
from clpl_moe.common.options import option
from clpl_moe.prepare.files import collect_queries, read_passages, read_qrels, read_table
from clpl_moe.prepare.source import Passage, Source, Split, register_source
from clpl_moe.retrieval.collection import check_id

# Language -> number of the corpus's files on the hub.
PARTS = {
    **{"ar": 5, "bn": 1, "de": 32, "en": 66, "es": 21, "fa": 5, "fi": 4, "fr": 30, "hi": 2},
    **{"id": 3, "ja": 14, "ko": 3, "ru": 20, "sw": 1, "te": 2, "th": 2, "yo": 1, "zh": 10},
}
WITHOUT_TRAIN = ("de", "yo")
CORPUS, QUERIES = "miracl/miracl-corpus", "miracl/miracl"  # repositories on the hub
_PAGE = "https://huggingface.co/datasets/"


@register_source("miracl")
@dataclass
class Miracl(Source):
    """MIRACL in one language, from the hub or from a folder."""

    id_field: ClassVar[str] = "docid"

    miracl: str = option(f"MIRACL in this language: {', '.join(sorted(PARTS))}")
    source: str | None = option("folder that holds its files, where there is no network", None)
    splits: list[str] | None = option("train, dev or both; both unless named", None)

    def __post_init__(self) -> None:
        if self.miracl not in PARTS:
            raise OptionError("miracl", f"found {self.miracl!r}, expected one of {', '.join(sorted(PARTS))}")
        for split in self.splits or ():
            if split not in ("train", "dev"):
                fault = f"found {split!r}, expected train or dev: judgements of others are not public"
                raise OptionError("splits", fault)
            if split == "train" and self.miracl in WITHOUT_TRAIN:
                raise OptionError("splits", f"MIRACL has no train queries in {self.miracl}, expected dev alone")
        if self.splits is None:
            self.splits = ["dev"] if self.miracl in WITHOUT_TRAIN else ["train", "dev"]

    def default_language(self) -> str:
        return self.miracl

    def files(self) -> list[str]:
        return [] if self.source is None else [self.source]

    def read_passages(self) -> Iterator[Passage]:
        return read_passages(self._files[0], self.id_field)

    def read_splits(self) -> dict[str, Split]:
        splits = {}
        for split, (topics, qrels) in self._files[1].items():
            queries = collect_queries(topics, _read_topics(topics), "query id")
            judgements = read_qrels(qrels, ("query id", "Q0", "passage id", "relevance"), queries, topics)
            splits[split] = Split(queries, judgements)
        return splits

    @cached_property
    def _files(self) -> tuple[list[Path], dict[str, tuple[Path, Path]]]:
        """The corpus's files in order, and for each split its topics and its qrels."""
        corpus, queries = self._download() if self.source is None else (Path(self.source), Path(self.source))
        for folder in (corpus, queries):
            if not folder.is_dir():
                raise UserError(
                    f"{at(folder)}: {no_such('folder', folder)}; expected one with\n{self._placement(folder)}"
                )
        missing, found = [], {}
        for split in self.splits or ():
            topics, qrels = (
                queries / (name if (queries / name).is_file() else Path(name).name) for name in self._names(split)
            )
            missing += [path.name for path in (topics, qrels) if not path.is_file()]
            found[split] = (topics, qrels)
        pattern = "docs-*.jsonl.gz"
        there = list((corpus / self._corpus_folder).glob(pattern)) or list(corpus.glob(pattern))
        matches = ((re.fullmatch(r"docs-(\d+)\.jsonl\.gz", path.name), path) for path in there)
        numbers = {int(match[1]): path for match, path in matches if match}
        missing += [f"docs-{n}.jsonl.gz" for n in range(max(numbers, default=0) + 1) if n not in numbers]
        if missing:
            place = at(queries if queries == corpus else corpus)
            raise UserError(f"{place}: {', '.join(missing)} not found; expected\n{self._placement(corpus)}")
        if len(numbers) < PARTS[self.miracl]:
            folder, language = numbers[0].parent, self.miracl
            few = f"{folder}: {len(numbers)} of the {PARTS[language]} files of MIRACL's passages in {language}"
            if self.source is None:
                raise UserError(f"{few} have come; run again with a network")
            print(f"warning: {few} are here; the collection will hold what these have", file=sys.stderr)
        return [numbers[n] for n in sorted(numbers)], found

    @property
    def _corpus_folder(self) -> str:
        return f"miracl-corpus-v1.0-{self.miracl}"

    def _names(self, split: str) -> tuple[str, str]:
        """Paths of the topics and of the qrels in their repository."""
        base = f"miracl-v1.0-{self.miracl}"
        return f"{base}/topics/topics.{base}-{split}.tsv", f"{base}/qrels/qrels.{base}-{split}.tsv"

    def _placement(self, folder: str | Path = "DIR") -> str:
        """For messages: which files go where in a local folder, and which repositories have them."""
        parts = PARTS[self.miracl]
        files = [
            *((f"{self._corpus_folder}/docs-{number}.jsonl.gz", CORPUS) for number in sorted({0, parts - 1})),
            *((name, QUERIES) for split in self.splits or () for name in self._names(split)),
        ]
        width = max(len(name) for name, _ in files)
        lines = [f"  {folder}/{name:<{width}}  from {_PAGE}{repo}" for name, repo in files]
        if parts > 2:
            lines.insert(1, "  ... and all between")
        return "\n".join([*lines, f"or all of them in {folder} itself."])

    def _download(self) -> tuple[Path, Path]:
        """Fetch the files through the hub's cache, where they stay; returns the folders of the corpus and of the queries."""
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        by_hand = f"Or place the files by hand and set source to their folder DIR:\n{self._placement()}"
        try:
            # The small files first: a missing token shows before hundreds of megabytes have come.
            for split in self.splits or ():
                for name in self._names(split):
                    queries = Path(hf_hub_download(QUERIES, name, repo_type="dataset")).parents[2]
            pattern = f"{self._corpus_folder}/*.jsonl.gz"
            corpus = Path(snapshot_download(CORPUS, repo_type="dataset", allow_patterns=pattern))
        except Exception as error:  # some are of the hub's HTTP library, which depends on its version
            if isinstance(error, OSError) and error.errno is not None:
                raise  # a full disk, say
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status in (401, 403):
                fault = (
                    f"the hub refused {QUERIES} ({status}). Accept its terms on {_PAGE}{QUERIES} (logged in), then run"
                    " `hf auth login`, or set HF_TOKEN to a token that may read gated repositories."
                )
            elif isinstance(error, LocalEntryNotFoundError) or status is None:
                reason = type(error.__cause__ or error).__name__
                fault = f"the hub could not be reached ({reason}). With a network, run again: what has come is kept."
            else:
                fault = f"the hub answered with an error ({status}); run again later."
            raise UserError(f"{fault} {by_hand}") from None
        return corpus, queries


def _read_topics(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in read_table(path):
        identifier, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise UserError(f"{at(path, number)}: found {line!r:.80}, expected a query's id, a tab and its text")
        check_id(identifier, path, number, "query id")
        yield number, identifier, text.strip()
