"""A model in the form in which it is used: with a smaller vocabulary, in another precision.

``export.json`` in the folder says what it was made from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe.common.api import takes_options
from clpl_moe.common.files import refuse_existing, write_json
from clpl_moe.common.output import Output, writing
from clpl_moe.export.options import ExportArguments

if TYPE_CHECKING:
    from clpl_moe.encoder import Encoder

__all__ = ["ExportArguments", "Exported", "export"]

_RECORD = "export.json"
# Of the output; first the record, which no other model folder has.
_FILES = (
    *(_RECORD, "*.json", "*.safetensors", "*.py", "*.model", "*.txt", "*.jinja", "*_linear.pt"),
    *("1_Pooling", "2_Normalize", "README.md"),
)


@dataclass
class Exported:
    """An exported model; ``str`` is the text for people.

    Attributes:
        folder: where it lies.
        size: bytes of weights in it.
        size_before: bytes of the weights of the model that it was made from.
        pieces: pieces of the vocabulary before and after, where it was trimmed.
    """

    folder: Path
    size: int
    size_before: int
    pieces: tuple[int, int] | None = None

    def __str__(self) -> str:
        lines = []
        if self.pieces is not None:
            lines.append(f"vocabulary: {self.pieces[0]:,} pieces before, {self.pieces[1]:,} after")
        share = self.size / self.size_before
        lines.append(f"weights: {_megabytes(self.size_before)} before, {_megabytes(self.size)} after ({share:.1%})")
        return "\n".join([*lines, f"saved to {self.folder}"])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


@takes_options(ExportArguments)
def export(arguments: ExportArguments) -> Exported:
    """Write a model in another form; returns what was written.

    Raises:
        UserError: a model that cannot be loaded, or whose vocabulary cannot be trimmed; a fault in the texts; an output in the
            way.
    """
    from clpl_moe.export.texts import text_files

    output = Path(str(arguments.output))
    with writing(output) as place:
        refuse_existing(output, arguments.overwrite, files=_FILES)
        corpus = text_files(arguments.trim_vocab)
        return _export(arguments, corpus, place)


def _export(arguments: ExportArguments, corpus: list[Path], place: Output) -> Exported:
    import torch

    from clpl_moe.encoder import Encoder
    from clpl_moe.export.card import write_card
    from clpl_moe.export.texts import read_texts
    from clpl_moe.export.vocabulary import trim_vocabulary

    name = str(arguments.input)
    encoder = Encoder.load(
        name,
        dtype=_stored_dtype(arguments),
        device="cpu",
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    found = Exported(Path(str(arguments.output)), 0, _size(encoder))
    if corpus:
        found.pieces = trim_vocabulary(encoder, read_texts(corpus))
    if arguments.dtype is not None:
        encoder.model.to(getattr(torch, arguments.dtype))
    found.size = _size(encoder)
    with place.replacement() as folder:
        encoder.save(folder)
        write_card(folder, arguments, found)
        write_json(folder / _RECORD, dataclasses.asdict(arguments) | _as_json(found))
    return found


def _stored_dtype(arguments: ExportArguments):
    import torch

    from clpl_moe.encoder.load import read_config

    config = read_config(str(arguments.input), revision=arguments.revision)
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _size(encoder: Encoder) -> int:
    return sum(tensor.nbytes for tensor in encoder.model.state_dict().values())


def _as_json(found: Exported) -> dict[str, object]:
    return {"size": found.size, "size_before": found.size_before, "pieces": found.pieces}
