"""A model in the form in which it is used: with a smaller vocabulary, as a graph of ONNX or OpenVINO, under the names of 2024, on the hub.

``export.json`` in the folder says what it was made from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import OptionError
from clpl_moe.common.files import refuse_existing, write_json
from clpl_moe.common.output import Output, writing
from clpl_moe.export.hub import check_name, upload
from clpl_moe.export.options import ExportArguments

if TYPE_CHECKING:
    from clpl_moe.encoder import Encoder

__all__ = ["ExportArguments", "Exported", "Graph", "export"]

_RECORD = "export.json"
# Of the output; first the record, which no other model folder has.
_FILES = (
    *(_RECORD, "*.json", "*.safetensors", "*.py", "*.model", "*.txt", "*.jinja", "*_linear.pt"),
    *("1_Pooling", "2_Normalize", "onnx", "openvino", "README.md"),
)


@dataclass
class Graph:
    """A graph: bytes on the disk, and the least cosine of its embeddings with torch's."""

    size: int
    cosine: float


@dataclass
class Exported:
    """An exported model; ``str`` is the text for people.

    Attributes:
        folder: where it lies.
        size: bytes of its weights, of a graph before it was made.
        size_before: bytes of the weights of the model that it was made from.
        pieces: pieces of the vocabulary before and after, where it was trimmed.
        graphs: file in the folder -> graph of ONNX or OpenVINO.
        commit: address of the upload on the hub.
    """

    folder: Path
    size: int
    size_before: int
    pieces: tuple[int, int] | None = None
    graphs: dict[str, Graph] = field(default_factory=dict)
    commit: str | None = None

    def __str__(self) -> str:
        lines = []
        if self.pieces is not None:
            lines.append(f"vocabulary: {self.pieces[0]:,} pieces before, {self.pieces[1]:,} after")
        share = self.size / self.size_before
        lines.append(f"weights: {_megabytes(self.size_before)} before, {_megabytes(self.size)} after ({share:.1%})")
        for name, graph in self.graphs.items():
            lines.append(f"{name}: {_megabytes(graph.size)}, cosine with torch at least {graph.cosine:.6f}")
        lines.append(f"saved to {self.folder}")
        return "\n".join(lines + ([f"uploaded: {self.commit}"] if self.commit is not None else []))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


@takes_options(ExportArguments)
def export(arguments: ExportArguments) -> Exported:
    """Write a model in another form and, if asked, upload it; returns what was written.

    Raises:
        UserError: a model that cannot be loaded or does not fit the form; a fault in the texts; an output in the way; a library
            that is missing; a graph that does not compute what torch does; a hub that does not take the upload.
    """
    from clpl_moe.export.texts import read_texts, text_files

    output = Path(str(arguments.output))
    with writing(output) as place:
        refuse_existing(output, arguments.overwrite, files=_FILES)
        corpus = text_files(arguments.trim_vocab)
        checked = list(read_texts(text_files([arguments.check_texts]))) if arguments.check_texts is not None else []
        if arguments.check_texts is not None and not checked:
            raise OptionError("check_texts", "found no text, expected one a line")
        if arguments.push_to_hub is not None:
            check_name(arguments.push_to_hub)
        found = _export(arguments, corpus, checked, place)
        if arguments.push_to_hub is not None:
            found.commit = upload(output, arguments.push_to_hub, arguments.hub_revision, arguments.hub_private)
        return found


def _export(arguments: ExportArguments, corpus: list[Path], checked: list[str], place: Output) -> Exported:
    import torch

    from clpl_moe.encoder import Encoder
    from clpl_moe.export.card import write_card
    from clpl_moe.export.format_2024 import check_2024, write_2024
    from clpl_moe.export.onnx_graph import refuse_missing, write_graphs
    from clpl_moe.export.texts import read_texts
    from clpl_moe.export.vocabulary import trim_vocabulary

    if arguments.to in ("onnx", "openvino"):
        refuse_missing(arguments.to)
    encoder = Encoder.load(
        str(arguments.input),
        dtype=_stored_dtype(arguments),
        device="cpu",
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.to == "2024":
        check_2024(encoder)
    found = Exported(Path(str(arguments.output)), 0, _size(encoder))
    if corpus:
        found.pieces = trim_vocabulary(encoder, read_texts(corpus))
    if arguments.dtype is not None:
        encoder.model.to(getattr(torch, arguments.dtype))
    found.size = _size(encoder)
    with place.replacement() as folder:
        if arguments.to in ("onnx", "openvino"):
            cosines = write_graphs(encoder, folder, checked, to=arguments.to, int8=arguments.int8)
            found.graphs = {name: Graph(_size_of_graph(folder / name), cosine) for name, cosine in cosines.items()}
        elif arguments.to == "2024":
            write_2024(encoder, folder)
        else:
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


def _size_of_graph(path: Path) -> int:
    """Also of what lies beside it: ``model.onnx_data``, ``openvino_model.bin``."""
    beside = f"{path.stem}.*" if path.suffix == ".xml" else f"{path.name}*"
    return sum(file.stat().st_size for file in path.parent.glob(beside))


def _as_json(found: Exported) -> dict[str, object]:
    described = dataclasses.asdict(found)
    return {name: described[name] for name in ("size", "size_before", "pieces", "graphs")}
