"""What do an ONNX graph, its 8-bit form, a trimmed vocabulary and missing prompts cost in retrieval quality?

``python benchmarks/export.py runs/quickstart runs/quickstart/experts models/small-encoder`` needs the extra ``onnx``.

Each model is exported for the Korean sample, whose dev questions are then searched with the embeddings of torch and of
onnxruntime.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clpl_moe import Encoder
from clpl_moe.evaluate.metrics import evaluate_run
from clpl_moe.export import export
from clpl_moe.export.onnx_graph import FLOAT, INT8, graph_embeddings
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.search import search
from common import RESULTS, write_result

_METRIC = "nDCG@10"
_FORMS = ("trimmed", "onnx", "prompts")


def measure(model: Path, data: Path, language: str, forms: list[str], scratch: Path) -> list[dict[str, Any]]:
    """A row for a model, and one for each of its forms."""
    sample = Collection.load(data, language, "dev")
    encoder = Encoder.load(model, device="cpu", compute_dtype=torch.float32)
    whole = _embeddings(encoder, sample)
    name = "/".join(model.parts[-2:])  # a run holds its model with experts in a folder of its own

    def row(form: str, size: int, found: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
        cosines = [torch.cosine_similarity(mine, theirs).min() for mine, theirs in zip(found, whole)]
        difference = max(float((mine - theirs).abs().max()) for mine, theirs in zip(found, whole))
        described = {"model": name, "form": form, "MB": round(size / 1e6, 1), _METRIC: _score(sample, found)}
        return described | {"least cosine": round(float(min(cosines)), 6), "largest difference": difference}

    rows = [row("torch", sum(tensor.nbytes for tensor in encoder.model.state_dict().values()), whole)]
    if "prompts" in forms:  # what tools make of a folder that read only some of its settings
        own = encoder.settings
        bare = replace(own, query_prompt="", passage_prompt="")
        others = {
            "without prompts": bare,
            "passages' prompt on both sides": replace(own, query_prompt=own.passage_prompt),
            "CLS, without prompts": replace(bare, pooling="cls"),
        }
        for form, encoder.settings in others.items():
            rows.append(row(f"torch, {form}", rows[0]["MB"] * 10**6, _embeddings(encoder, sample)))
        encoder.settings = own
    if "trimmed" in forms:
        trimmed = export(input=model, output=scratch / "trimmed", trim_vocab=[data / language])
        small = Encoder.load(trimmed.folder, device="cpu", compute_dtype=torch.float32)
        rows.append(row("trimmed", trimmed.size, _embeddings(small, sample)))
    if "onnx" in forms:
        exported = export(input=model, output=scratch / "onnx", to="onnx", int8=True)
        for form, file in (("ONNX", FLOAT), ("ONNX, 8 bits", INT8)):
            texts = {"query": sample.queries, "passage": sample.passages}
            found = [graph_embeddings(exported.folder / file, encoder, of, kind) for kind, of in texts.items()]
            rows.append(row(form, exported.graphs[file].size, (found[0], found[1])))
    return rows


def _embeddings(encoder: Encoder, sample: Collection) -> tuple[torch.Tensor, torch.Tensor]:
    return encoder.encode_queries(sample.queries), encoder.encode_passages(sample.passages)


def _score(sample: Collection, embeddings: tuple[torch.Tensor, torch.Tensor]) -> float:
    scores, places = search(*embeddings, 10)
    run = {
        query: {sample.passage_ids[place]: float(score) for score, place in zip(*found)}
        for query, *found in zip(sample.query_ids, scores, places.tolist())
    }
    return round(evaluate_run(sample.qrels, run, [_METRIC])[0][_METRIC], 4)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, help="model folders")
    parser.add_argument("--data", type=Path, default=Path("data/samples"))
    parser.add_argument("--language", default="ko")
    parser.add_argument(
        "--forms", nargs="+", default=list(_FORMS), choices=_FORMS, help="what is measured beside torch"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "export.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            rows += measure(model, args.data, args.language, args.forms, Path(scratch))
    settings = {"models": [model.name for model in args.models], "data": args.data.name, "language": args.language}
    question = "Search with exported models: quality on the sample, size, and embeddings beside torch's."
    write_result(args.output, question, settings, rows, {})


if __name__ == "__main__":
    main()
