"""The model card of an exported folder: the one that the model had, or a short one, and how it was exported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open
from clpl_moe.common.markup import as_code, as_python, in_markdown

if TYPE_CHECKING:
    from clpl_moe.export import Exported
    from clpl_moe.export.options import ExportArguments

CARD = "README.md"


def write_card(folder: Path, arguments: ExportArguments, exported: Exported) -> None:
    """Write ``README.md`` into a folder."""
    from clpl_moe.encoder.weights import find_file

    own = find_file(str(arguments.input), CARD, {"revision": arguments.revision})
    try:
        text = Path(own).read_text(encoding="utf-8") if own is not None else _short_card(arguments, exported)
    except UnicodeDecodeError as error:
        raise UserError(f"{at(str(own))}: not UTF-8 text ({error.reason})") from None
    with atomic_open(folder / CARD) as file:
        file.write(text.rstrip("\n") + "\n\n" + _section(arguments, exported))


def _short_card(arguments: ExportArguments, exported: Exported) -> str:
    from huggingface_hub import ModelCardData

    name, base = exported.folder.resolve().name, str(arguments.input)
    header = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction"],
        # The hub takes names of its own only.
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None,
    )
    return f"---\n{header.to_yaml()}\n---\n\n# {in_markdown(name)}\n\nA text embedding model for retrieval.\n"


def _section(arguments: ExportArguments, exported: Exported) -> str:
    made_from = Path(str(arguments.input)).name if Path(str(arguments.input)).exists() else str(arguments.input)
    revision = f", revision {as_code(arguments.revision)}" if arguments.revision else ""
    lines = ["## Export", "", f"Made by `clpl-moe export` from {as_code(made_from)}{revision}.", ""]
    if exported.pieces is not None:
        before, after = exported.pieces
        texts = ", ".join(as_code(Path(name).name) for name in arguments.trim_vocab)
        lines.append(
            f"- The vocabulary has {after:,} of {before:,} pieces: the ones that {texts} use, and all single characters."
        )
    for graph, made in exported.graphs.items():
        lines.append(f"- {as_code(graph)}: embeddings have a cosine of at least {made.cosine:.6f} with torch's.")
    if arguments.to == "2024":
        lines.append(
            "- The weights have the names of the checkpoints of 2024, which sentence-transformers does not load."
        )
    name = arguments.push_to_hub or exported.folder.resolve().name
    if arguments.to == "folder":
        lines.append("- Use: " + as_code(f"SentenceTransformer({as_python(name)})"))
    elif arguments.to in ("onnx", "openvino"):
        call = f'SentenceTransformer({as_python(name)}, backend="{arguments.to}")'
        lines.append(f"- Use: {as_code(call)}, which needs optimum.")
    else:
        lines.append("- Use: " + as_code(f"clpl_moe.Encoder.load({as_python(name)})"))
    return "\n".join(lines) + "\n"
