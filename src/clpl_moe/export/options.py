"""Options of ``export``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clpl_moe.common.errors import OptionError
from clpl_moe.common.files import resolved
from clpl_moe.common.options import check_bounds, option


@dataclass
class ExportArguments:
    """What is exported, in which form, and where to."""

    input: str | None = option("model to export: a folder or hub name, with experts or dense", None)
    output: str | None = option("folder to write; must be new or empty, unless overwrite is set", None)
    to: Literal["folder", "onnx", "openvino", "2024"] = option(
        "form: folder, a model folder that every tool loads; onnx or openvino, a graph for onnxruntime or OpenVINO; 2024, the"
        " weights' names of the checkpoints published in 2024",
        "folder",
    )
    revision: str | None = option("commit, branch or tag of input on the hub; not given: the newest", None)
    trim_vocab: list[str] = option(
        "files or folders of text (.jsonl, .txt, also .gz and .zst), such as a collection: only the pieces of the vocabulary"
        " that this text uses are kept, and what other text needs",
        [],
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = option(
        "precision of the weights that are written; not given: as they are in input", None
    )
    int8: bool = option("with onnx: writes a graph with 8-bit weights, too", False)
    check_texts: str | None = option(
        "with onnx and openvino: file with a text a line, whose embeddings are compared with torch's; not given: built-in lines in"
        " Korean, Persian and Hindi",
        None,
    )
    push_to_hub: str | None = option("model on the hub that the folder is uploaded to, such as me/my-model", None)
    hub_revision: str | None = option("with push_to_hub: branch to upload to, made where it is missing", None)
    hub_private: bool = option("with push_to_hub: a model that is made is private", False)
    trust_remote_code: bool = option("run code that the model's own folder holds; look at it first", False)
    overwrite: bool = option("replace the exported model that is there", False)

    def __post_init__(self) -> None:
        check_bounds(self)
        for name in ("input", "output"):
            if not getattr(self, name):
                raise OptionError(name, "found nothing, expected a folder")
        if resolved(str(self.input)) == resolved(str(self.output)):
            raise OptionError("output", "found the folder of input, expected another one")
        graph = self.to in ("onnx", "openvino")
        if self.int8 and self.to != "onnx":
            raise OptionError("int8", "goes with to onnx")
        if self.check_texts and not graph:
            raise OptionError("check_texts", "goes with to onnx and to openvino")
        if graph and self.dtype not in (None, "float32"):
            smaller = "; int8 writes a smaller graph" if self.to == "onnx" else ""
            raise OptionError("dtype", f"found {self.dtype}, expected float32 with to {self.to}{smaller}")
        if self.push_to_hub is None:
            for name in ("hub_revision", "hub_private"):
                if getattr(self, name):
                    raise OptionError(name, "goes with push_to_hub")
