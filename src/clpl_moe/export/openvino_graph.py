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
from clpl_moe.export.onnx_graph import padded_pairs


def convert(source: Path, target: Path) -> None:
    """Put the graph of OpenVINO, whose weights have 32 bits, in the place of the folder of an ONNX one."""
    import openvino

    target.parent.mkdir()
    openvino.save_model(openvino.convert_model(str(source)), str(target), compress_to_fp16=False)
    shutil.rmtree(source.parent)


def openvino_embeddings(path: Path, encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """``sentence_embedding`` (B, D) of passages by OpenVINO in float32, on this processor."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    graph = openvino.Core().compile_model(str(path), "CPU", settings)
    names = {name for node in graph.inputs for name in node.names}
    batches = padded_pairs(encoder, texts, names)
    return torch.cat([torch.from_numpy(graph(batch)["sentence_embedding"].copy()) for batch in batches])
