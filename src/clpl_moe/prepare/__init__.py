"""``python -m clpl_moe.prepare``: turn a data set of another shape into a retrieval collection.

One of three sources: files in SQuAD's shape, MIRACL, a folder in BEIR's layout; what is made of each is said in its
module in :mod:`clpl_moe.prepare.sources`.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

from clpl_moe.common.errors import UserError, at
from clpl_moe.prepare.sources import beir, miracl
from clpl_moe.prepare.sources.squad import make_collection, read_squad, write_collection
from clpl_moe.prepare.sources.stream import write_streaming
from clpl_moe.retrieval.collection import check_language


@dataclass
class PrepareArguments:
    """What to read and where to put the collection."""

    output: str = field(metadata={"help": "folder for collections"})
    squad: list[str] | None = field(default=None, metadata={"help": "JSON files in SQuAD's shape"})
    miracl: str | None = field(
        default=None, metadata={"help": f"MIRACL in this language: {', '.join(sorted(miracl.PARTS))}"}
    )
    beir: str | None = field(
        default=None, metadata={"help": "folder with corpus.jsonl, queries.jsonl and qrels/<split>.tsv"}
    )
    language: str | None = field(
        default=None,
        metadata={"help": "name of the collection's folder inside --output, such as ko; with --miracl its language"},
    )
    source: str | None = field(
        default=None, metadata={"help": "with --miracl: folder that holds its files, where there is no network"}
    )
    splits: list[str] | None = field(
        default=None,
        metadata={"help": "with --miracl, of train and dev (both unless named); with --beir (all unless named)"},
    )
    dev_share: float = field(
        default=0.2, metadata={"help": "with --squad: share of the articles whose questions are for dev"}
    )
    seed: int = field(default=42, metadata={"help": "with --squad: decides which articles are for dev"})
    titles: bool = field(default=True, metadata={"help": "give each passage the title of its article"})
    overwrite: bool = field(default=False, metadata={"help": "replace the collection that is there"})

    def __post_init__(self) -> None:
        named = [name for name in ("squad", "miracl", "beir") if getattr(self, name) is not None]
        if len(named) != 1:
            found = " and ".join(f"--{name}" for name in named) or "none"
            raise UserError(f"found {found}, expected one of --squad, --miracl and --beir; --help lists the options")
        (kind,) = named
        belongs = {"source": ("miracl",), "splits": ("miracl", "beir"), "dev_share": ("squad",), "seed": ("squad",)}
        defaults = {option.name: option.default for option in fields(self)}
        for name, kinds in belongs.items():
            if kind not in kinds and getattr(self, name) != defaults[name]:
                raise UserError(f"--{name} goes with --{' and --'.join(kinds)}, not with --{kind}")
        if self.miracl is not None:
            if self.splits is None:
                self.splits = ["dev"] if self.miracl in miracl.WITHOUT_TRAIN else ["train", "dev"]
            miracl.check_options(self.miracl, self.splits)
            self.language = self.language or self.miracl
        if self.language is None:
            raise UserError(f"--language: missing, expected the name of the folder inside {self.output}, such as ko")
        check_language(self.language)
        if not 0 <= self.dev_share <= 1:
            raise UserError(f"--dev_share: found {self.dev_share}, expected a share from 0 to 1")


def prepare(arguments: PrepareArguments, folder: Path) -> Counter[str]:
    """Read the source, write the collection to ``folder`` and return counts of what became of it."""
    if arguments.squad is not None:
        articles = [article for path in arguments.squad for article in read_squad(path)]
        prepared = make_collection(articles, arguments.dev_share, arguments.seed, arguments.titles)
        write_collection(folder, prepared)
        return prepared.counts
    if arguments.beir is not None:
        corpus, queries, qrels = beir.find_files(Path(arguments.beir), arguments.splits)
        splits = beir.read_splits(queries, qrels)
        return write_streaming(folder, [corpus], beir.ID_FIELD, splits, titles=arguments.titles)
    language, names = arguments.miracl, arguments.splits
    roots = (Path(arguments.source),) * 2 if arguments.source is not None else miracl.download(language, names)
    parts, files = miracl.find_files(*roots, language, names)
    if len(parts) < miracl.PARTS[language]:
        few = (
            f"{parts[0].parent}: {len(parts)} of the {miracl.PARTS[language]} files of MIRACL's passages in {language}"
        )
        if arguments.source is None:
            raise UserError(f"{few} have come; run again with a network")
        print(f"warning: {few} are here; the collection will hold what these have", file=sys.stderr)
    splits = {split: miracl.read_split(*pair) for split, pair in files.items()}
    return write_streaming(folder, parts, miracl.ID_FIELD, splits, titles=arguments.titles)


def refuse_own_source(arguments: PrepareArguments, folder: Path) -> None:
    """Raise :class:`UserError` where a source lies in the folder that the collection would replace."""
    for path in (*(arguments.squad or ()), arguments.beir, arguments.source):
        if path is not None and Path(path).resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{at(path)}: the collection would replace {folder}, which holds this source; name another --output or"
                " --language"
            )
