"""Training data and collections in the formats of other tools, and back.

- Training data, in any format that training reads, become lines of this package, FlagEmbedding's lines, a table with
  sentence-transformers' columns, or a folder in BEIR's layout.
- A collection becomes a folder in BEIR's or MTEB's layout, or training lines: the judged passages of its queries.

``prepare`` makes collections of BEIR's and MTEB's layouts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import refuse_existing, refuse_input, resolved
from clpl_moe.common.output import writing
from clpl_moe.convert.options import ConvertArguments

__all__ = ["Converted", "convert"]

_FOLDER_FILES = ("corpus.jsonl", "queries.jsonl", "qrels", "README.md")


@dataclass
class Converted:
    """The file or folder that was written; what was read, written and left out, by name."""

    path: Path
    counts: Counter[str]


@takes_options(ConvertArguments)
def convert(arguments: ConvertArguments) -> Converted:
    """Read training data or a collection and write it in another format, whole or not at all.

    Raises:
        UserError: the data have a fault, do not fit the format, or the output is there and may not be replaced.
    """
    from clpl_moe.convert.layouts import write_collection
    from clpl_moe.convert.lines import write_lines
    from clpl_moe.data.formats import data_files

    output = Path(arguments.output)
    is_folder = arguments.to in ("beir", "mteb")
    with writing(output):
        refuse_existing(output, arguments.overwrite, files=_FOLDER_FILES if is_folder else ())
        if arguments.collection is not None:
            source = Path(arguments.collection, str(arguments.language))
            if resolved(output) == resolved(source):
                raise UserError(f"{output}: this command reads the folder; name another output")
            return Converted(output, write_collection(arguments, output))
        files = data_files(arguments.train_data)
        refuse_input(output, (read for file in files for read in file.paths))
        return Converted(output, write_lines(arguments, files, output))
