"""A model as an ONNX graph, laid out as optimum and fastembed look for it, and compared with torch as soon as it is written.

The folder is the model's own without its weights, and with ``onnx/model.onnx``. Outputs for B texts of L tokens:

- ``last_hidden_state`` (B, L, D): states of the tokens. It is the first, from which optimum, fastembed and
  sentence-transformers pool.
- ``sentence_embedding`` (B, D): what :class:`Encoder` gives: pooled, and normalised and truncated where the model's folder says so.
- ``sparse_weights`` (B, L), with the sparse head: at least 0, and 0 for special tokens and padding.
- ``colbert_vecs`` (B, L - 1, C), with the multi-vector head: of length 1, of all tokens but the first; 0 for padding.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpl_moe.common.errors import UserError, one_line
from clpl_moe.common.files import write_json
from clpl_moe.encoder import Encoder
from clpl_moe.encoder.encode import Kind, tokenize
from clpl_moe.encoder.encoder import save_tokenizer
from clpl_moe.encoder.settings import pool, write_settings
from clpl_moe.encoder.weights import HEAD_FILES, read_head
from clpl_moe.export.experts import compute_all_experts
from clpl_moe.export.int8 import quantize, smooth

FLOAT, INT8, OPENVINO = "onnx/model.onnx", "onnx/model_quantized.onnx", "openvino/openvino_model.xml"
# The least cosine with torch that an embedding may have.
LEAST = {FLOAT: 0.9999, INT8: 0.99, OPENVINO: 0.9999}
_OPSET = 18
_LARGEST = 2**31 - 2**24  # bytes of weights in one file of ONNX, with room for the graph
_NEEDED = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")

SAMPLES = [
    "대한민국의 수도는 어디인가요?",
    "서울은 한강을 끼고 있는 대한민국의 수도이며, 천만 명에 가까운 사람이 산다.",
    "پایتخت ایران کجاست؟",
    "تهران پایتخت ایران است و کتابخانه‌های بزرگی دارد.",
    "भारत की राजधानी कहाँ है?",
    "नई दिल्ली भारत की राजधानी है, जहाँ संसद भवन और कई संग्रहालय हैं।",
]


def refuse_missing(to: str) -> None:
    """Raise :class:`UserError` where a library is missing that ``to`` needs, "onnx" or "openvino": before the work, not after it."""
    for name in (*_NEEDED, *(["openvino"] if to == "openvino" else [])):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f'to {to}: {one_line(error)}; pip install "clpl-moe[{to}]"') from None


def write_graphs(
    encoder: Encoder, folder: Path, texts: Sequence[str] = (), *, to: str = "onnx", int8: bool = False
) -> dict[str, float]:
    """Write an encoder into a folder as a graph of ``to``, "onnx" or "openvino", which changes the encoder; returns the least
    cosine with torch by graph.

    Raises:
        UserError: a graph gives other embeddings than torch, or the model cannot be a graph.
    """
    encoder.model.float()
    encoder.compute_dtype = torch.float32
    texts = list(texts or SAMPLES)
    expected = encoder.encode_passages(texts, progress=False)
    compute_all_experts(encoder.model)
    graph = _Graph(encoder).eval()
    (folder / "onnx").mkdir()
    _write_graph(graph, encoder, folder / FLOAT)
    _write_rest(encoder, folder)
    found = {FLOAT: least_cosine(FLOAT, graph_embeddings(folder / FLOAT, encoder, texts), expected)}
    if int8:
        smooth(graph, encoder, texts)
        with tempfile.TemporaryDirectory(dir=folder) as place, _quiet():
            _write_graph(graph, encoder, Path(place, "smooth.onnx"))
            quantize(Path(place, "smooth.onnx"), folder / INT8, graph, encoder.model.config, _is_large(graph, 1))
        found[INT8] = least_cosine(INT8, graph_embeddings(folder / INT8, encoder, texts), expected)
    if to == "openvino":
        from clpl_moe.export import openvino_graph

        openvino_graph.convert(folder / FLOAT, folder / OPENVINO)
        embeddings = openvino_graph.openvino_embeddings(folder / OPENVINO, encoder, texts)
        found = {OPENVINO: least_cosine(OPENVINO, embeddings, expected)}
    return found


class _Graph(nn.Module):
    """What the graph computes."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.model, self.settings, tokenizer = encoder.model, encoder.settings, encoder.tokenizer
        special = [tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
        self.special = sorted({number for number in special if number is not None})
        files = encoder.head_files or {}
        self.sparse, self.colbert = (_linear(files[name]) if name in files else None for name in HEAD_FILES)
        self.outputs = ["last_hidden_state", "sentence_embedding"]
        self.outputs += [n for n, head in (("sparse_weights", self.sparse), ("colbert_vecs", self.colbert)) if head]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        pooled = pool(states, attention_mask, self.settings.pooling)
        whole = F.normalize(pooled, dim=-1) if self.settings.normalize else pooled
        outputs = [states, self.settings.truncate(whole)]
        if self.sparse is not None:
            real = attention_mask.bool()
            for number in self.special:
                real = real & (input_ids != number)
            outputs.append(self.sparse(states).squeeze(-1).relu() * real)
        if self.colbert is not None:
            outputs.append(F.normalize(self.colbert(states[:, 1:]), dim=-1) * attention_mask[:, 1:, None])
        return tuple(outputs)


def _linear(file: str) -> nn.Linear:
    head = {name: tensor.float() for name, tensor in read_head(file).items()}
    linear = nn.Linear(head["weight"].shape[1], head["weight"].shape[0])
    linear.load_state_dict(head)
    return linear


def _write_graph(graph: _Graph, encoder: Encoder, path: Path) -> None:
    ids = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])
    inputs = {"input_ids": ids % encoder.model.config.vocab_size, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, 3] = 0
    if "token_type_ids" in encoder.tokenizer.model_input_names and encoder.model.config.type_vocab_size > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    size = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length")}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                kwargs=inputs,
                dynamo=True,
                opset_version=_OPSET,
                input_names=list(inputs),
                output_names=graph.outputs,
                dynamic_shapes=dict.fromkeys(inputs, size),
                verbose=False,
            )
    except Exception as error:  # the exporter has many
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        fault = f"torch's exporter makes no graph of {type(encoder.model).__name__}"
        raise UserError(f"to onnx: {fault} ({type(cause).__name__}: {one_line(cause)})") from error
    assert program is not None
    import onnx_ir  # of onnxscript

    large = _is_large(graph)
    onnx_ir.save(program.model, path, external_data=f"{path.name}_data" if large else None)


def _is_large(graph: nn.Module, bytes_a_weight: int = 4) -> bool:
    return sum(tensor.numel() for tensor in graph.state_dict().values()) * bytes_a_weight > _LARGEST


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter and the quantizer warn of, which is about their own calls."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_rest(encoder: Encoder, folder: Path) -> None:
    encoder.model.config.save_pretrained(folder)
    tokenizer = encoder.tokenizer
    if tokenizer.model_max_length > encoder.max_length:  # fastembed takes no tokenizer without a limit
        tokenizer.model_max_length = encoder.max_length
    save_tokenizer(tokenizer, folder)
    write_json(folder / "special_tokens_map.json", dict(tokenizer.special_tokens_map))  # fastembed before 0.8 needs it
    hidden_size = encoder.model.config.hidden_size
    write_settings(folder, encoder.settings, max_length=encoder.max_length, hidden_size=hidden_size)


def open_session(path: Path) -> Any:
    """An ``InferenceSession`` of onnxruntime on this processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # which takes the processor from others
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def graph_embeddings(path: Path, encoder: Encoder, texts: Sequence[str], kind: Kind = "passage") -> Tensor:
    """``sentence_embedding`` (B, D) of texts by onnxruntime; in pairs, so that there is padding and lengths differ."""
    session = open_session(path)
    names = {node.name for node in session.get_inputs()}
    batches = padded_pairs(encoder, texts, names, kind)
    return torch.cat([torch.from_numpy(session.run(["sentence_embedding"], batch)[0]) for batch in batches])


def padded_pairs(
    encoder: Encoder, texts: Sequence[str], names: set[str], kind: Kind = "passage"
) -> Iterator[dict[str, np.ndarray]]:
    """What the inputs of these names get, two texts at a time: (2, L) in int64."""
    tokenized = tokenize(encoder, texts, kind=kind, max_length=encoder.max_length)
    sequences = [tokenized.sequences[place] for place in tokenized.places]
    for start in range(0, len(texts), 2):
        part = sequences[start : start + 2]
        ids = np.full((len(part), max(map(len, part))), encoder.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(part):
            ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        yield {name: array for name, array in inputs.items() if name in names}


def least_cosine(name: str, found: Tensor, expected: Tensor) -> float:
    """The least cosine of a graph's embeddings with torch's; :class:`UserError` where it is too low."""
    cosine = _cosine(found, expected)
    if not cosine > LEAST[name]:
        raise UserError(
            f"{name}: an embedding has the cosine {cosine:.6f} with torch's, expected more than {LEAST[name]}"
        )
    return cosine


def _cosine(found: Tensor, expected: Tensor) -> float:
    return float(F.cosine_similarity(found, expected).min())
