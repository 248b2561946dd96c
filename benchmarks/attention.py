"""Attention on a CPU: torch's own beside plain matrix products, and these beside powers, by precision, width and shape.

``python benchmarks/attention.py``

Two take turns, on texts of equal length as they lie in a packed stream. ``encoder/attention.py`` chooses by these figures.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clpl_moe.common.allocator import keep_freed_memory
from clpl_moe.encoder.attention import power_attention, product_attention
from common import DTYPES, RESULTS, side_by_side, write_result

HEADS = {"small encoder, 12 heads of 32": (12, 32), "BGE-M3, 16 heads of 64": (16, 64)}
SHAPES = [(1, 8), (8, 20), (4, 64), (2, 200), (4, 256), (1, 434), (8, 512)]  # texts and tokens of each
WAYS = {
    "torch": lambda *states, dropout: F.scaled_dot_product_attention(*states, dropout_p=dropout),
    "products": product_attention,
    "powers": lambda *states, dropout: power_attention(*states),
}
CASES = {
    "forward": (False, 0.0, ("torch", "products")),
    "training": (True, 0.0, ("torch", "products")),
    "training, dropout 0.1": (True, 0.1, ("torch", "products")),
    "encoding": (False, 0.0, ("products", "powers")),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "attention.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    keep_freed_memory()
    rows = []
    for precision in args.precisions:
        for model, (heads, width) in HEADS.items():
            for texts, tokens in SHAPES:
                states = [torch.randn(texts * tokens, heads, width, dtype=DTYPES[precision]) for _ in range(3)]
                row: dict[str, Any] = {"precision": precision, "heads": model, "texts": texts, "tokens": tokens}
                for case in args.cases:
                    backward, dropout, ways = CASES[case]
                    calls = {way: partial(run, way, states, texts, backward, dropout) for way in ways}
                    times = side_by_side(calls, torch.device("cpu"), args.repeats)
                    row |= {f"{case}: {way}, ms": round(1000 * times[way]["seconds"], 2) for way in ways}
                    row[f"{case}: ratio"] = round(1 / times[ways[1]]["ratio"], 2)
                rows.append(row)
                print(row, flush=True)
    question = (
        "Attention on a CPU: torch's own beside product, softmax and product, and these beside powers; ratio: the first's"
        " time to the second's."
    )
    settings = {
        "model": "random states",
        "precision": " and ".join(args.precisions),
        "threads": torch.get_num_threads(),
    }
    write_result(args.output, question, settings | {"repeats": args.repeats}, rows, {})


def run(way: str, states: list[Tensor], texts: int, backward: bool, dropout: float) -> None:
    """One pass, forward or both."""
    with torch.set_grad_enabled(backward):
        parts = [state.detach().requires_grad_(backward) for state in states]
        query, key, value = (part.unflatten(0, (texts, -1)).transpose(1, 2) for part in parts)
        output = WAYS[way](query, key, value, dropout=dropout)
        if backward:
            output = output.transpose(1, 2).flatten(0, 1)
            output.backward(torch.ones_like(output))


if __name__ == "__main__":
    main()
