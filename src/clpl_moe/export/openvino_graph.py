"""A model as a graph of OpenVINO, made from the ONNX one, laid out as optimum and sentence-transformers look for it.

Inputs and outputs are those of :mod:`clpl_moe.export.onnx_graph`. OpenVINO computes in bfloat16 where the processor is fast at it, unless it is
asked for float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clpl_moe.encoder import Encoder
from clpl_moe.export.onnx_graph import FLOAT, OPENVINO, SAMPLES, least_cosine, padded_pairs, write_onnx


def write_openvino(encoder: Encoder, folder: Path, texts: Sequence[str] = ()) -> dict[str, float]:
    """As :func:`~clpl_moe.export.onnx_graph.write_onnx`, for the graph of OpenVINO, whose weights have 32 bits."""
    texts = list(texts or SAMPLES)
    encoder.model.float()
    encoder.compute_dtype = torch.float32
    expected = encoder.encode_passages(texts, progress=False)
    write_onnx(encoder, folder, texts)
    (folder / OPENVINO).parent.mkdir()
    _convert(folder / FLOAT, folder / OPENVINO)
    shutil.rmtree((folder / FLOAT).parent)
    return {OPENVINO: least_cosine(OPENVINO, openvino_embeddings(folder / OPENVINO, encoder, texts), expected)}


def _convert(source: Path, target: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(str(source)), str(target), compress_to_fp16=False)


def openvino_embeddings(path: Path, encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """``sentence_embedding`` (B, D) of passages by OpenVINO in float32, on this processor."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    graph = openvino.Core().compile_model(str(path), "CPU", settings)
    names = {name for node in graph.inputs for name in node.names}
    batches = padded_pairs(encoder, texts, names)
    return torch.cat([torch.from_numpy(graph(batch)["sentence_embedding"].copy()) for batch in batches])
