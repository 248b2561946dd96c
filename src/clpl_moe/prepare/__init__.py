"""Turn a data set of another shape into a retrieval collection.

The data set is one of the registered sources: files in SQuAD's shape, MIRACL, a folder in BEIR's layout, or one's own
(:func:`register_source`). The source's module in :mod:`clpl_moe.prepare.sources` says how it is read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import refuse_existing, resolved
from clpl_moe.common.output import writing
from clpl_moe.prepare.options import PrepareArguments, prepare_arguments
from clpl_moe.prepare.source import Passage, Source, Split, register_source

__all__ = ["Passage", "Prepared", "Source", "Split", "prepare", "register_source"]


@dataclass
class Prepared:
    """The folder of the collection that was written; what was read, skipped, merged and left, by name; the source's note."""

    folder: Path
    counts: Counter[str]
    note: str = ""


@takes_options(prepare_arguments)
def prepare(arguments: PrepareArguments) -> Prepared:
    """Read a source and write it as a collection, whole or not at all.

    Raises:
        UserError: the source is missing or faulty, or the collection is there and may not be replaced.
    """
    from clpl_moe.retrieval.collection import COLLECTION_FILES

    folder = Path(arguments.output) / str(arguments.language)
    source = arguments.reader
    for path in source.files():
        if resolved(path).is_relative_to(resolved(folder)):
            fault = f"the collection would replace {folder}, which holds this source"
            raise UserError(f"{at(path)}: {fault}; set another output or language")
    with writing(folder):
        refuse_existing(folder, arguments.overwrite, files=COLLECTION_FILES)
        return Prepared(folder, source.write(folder, arguments.titles), source.note)
