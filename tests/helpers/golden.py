"""The deterministic encoders and inputs whose embeddings and losses stand in ``data/golden.json``.

Each tensor is a function of its name and shape only: standard normal numbers of numpy's default generator,
seeded with the CRC-32 of the name, then scaled. So the numbers of the 2024 code are checked without storing
weights.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "golden.json").read_text(encoding="utf-8"))


def golden_case(moe: str | None) -> dict:
    """The numbers of the dense encoder (None) or of that with experts in ``intermediate`` or ``output``."""
    return next(case for case in GOLDEN["cases"] if case["moe"] == moe)


def seeded_tensor(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The float32 tensor of a name in the 2024 format."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)
    if "LayerNorm.weight" in name:
        return torch.from_numpy(1.0 + 0.05 * values)
    if name.endswith("gate.weight"):
        return torch.from_numpy(0.5 * values)
    return torch.from_numpy((0.03 if values.ndim == 2 else 0.02) * values)


def golden_state(moe: str | None, num_experts: int) -> dict[str, Tensor]:
    """State dict in the 2024 format."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    with torch.device("meta"):
        shapes = {k: v.shape for k, v in XLMRobertaModel(XLMRobertaConfig(**GOLDEN["dims"])).state_dict().items()}
    if moe is not None:
        for layer in range(GOLDEN["dims"]["num_hidden_layers"]):
            dense = f"encoder.layer.{layer}.{moe}.dense"
            weight, bias = shapes.pop(f"{dense}.weight"), shapes.pop(f"{dense}.bias")
            shapes[f"{dense}.gate.weight"] = (num_experts, weight[1])
            for expert in range(num_experts):
                shapes[f"{dense}.experts.{expert}.weight"] = weight
                shapes[f"{dense}.experts.{expert}.bias"] = bias
    return {name: seeded_tensor(name, shape) for name, shape in shapes.items()}


def golden_inputs() -> dict[str, dict[str, Tensor]]:
    """Token ids and masks of the query, the passages and the queries of the negatives."""
    return {
        "query": _inputs(1, 12, seed=12),
        "passages": _inputs(5, 24, seed=11),
        "negative_queries": _inputs(4, 14, seed=13),
    }


def _inputs(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, GOLDEN["dims"]["vocab_size"], (rows, length))
    ids[:, 0] = 0
    mask = np.ones_like(ids)
    for row in range(rows):
        tokens = int(rng.integers(5, length + 1))
        ids[row, tokens - 1] = 2
        ids[row, tokens:] = 1
        mask[row, tokens:] = 0
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
