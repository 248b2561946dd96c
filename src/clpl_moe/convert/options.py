"""Options of ``convert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.common.options import check_bounds, check_needs, check_outputs, option
from clpl_moe.retrieval.collection import check_language

Target = Literal["jsonl", "flag_embedding", "sentence_transformers", "beir", "mteb"]
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
OF_COLLECTIONS, OF_TRAINING = ("jsonl", "beir", "mteb"), get_args(Target)[:-1]


@dataclass
class ConvertArguments:
    """What is read, and what is written of it."""

    output: str = option("file to write (jsonl, flag_embedding, sentence_transformers), or folder (beir, mteb)")
    to: Target = option("what to write")
    train_data: list[str] = option("files or folders of training data, or hub:NAME, in any format that train reads", [])
    collection: str | None = option("collection to convert, in place of training data", None)
    language: str | None = option("with collection: the folder inside it, such as ko", None)
    splits: list[str] | None = option("with collection: splits to convert, all unless named", None)
    negatives: int | None = option(
        "with sentence_transformers: negatives of each row; lines with fewer are left out; not given: as many as every line"
        " has",
        None,
        least=0,
        most=1_000,
    )
    overwrite: bool = option("replace the output that is there", False)

    def __post_init__(self) -> None:
        check_bounds(self)
        check_outputs(self, "output")
        if bool(self.train_data) == (self.collection is not None):
            raise UserError("expected either train_data or a collection to convert")
        allowed = OF_COLLECTIONS if self.collection is not None else OF_TRAINING
        if self.to not in allowed:
            kind = "a collection" if self.collection is not None else "training data"
            raise OptionError("to", f"found {self.to}, expected one of {', '.join(allowed)} for {kind}")
        if self.collection is None:
            check_needs(self, dict.fromkeys(("language", "splits"), "collection"))
        else:
            if self.language is None:
                raise OptionError("language", "missing, expected the folder inside collection, such as ko")
            check_language(self.language)
        check_needs(self, {"negatives": "to sentence_transformers"})
        ending = Path(self.output).suffix.lower()
        known = {"sentence_transformers": TABLES, "jsonl": TABLES[:1], "flag_embedding": TABLES[:1]}.get(self.to)
        if known is not None and ending not in known:
            raise OptionError("output", f"found {self.output!r}, expected a name that ends in {' or '.join(known)}")
