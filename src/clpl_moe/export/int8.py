"""A graph with 8-bit weights, whose activations onnxruntime rounds to 8 bits in each run.

One scale serves all channels of an activation. The states of XLM-R have a few channels that are far above the others, for which
8 bits then leave little. So each Linear takes its input divided by a number a channel, and its weights multiplied by it
(SmoothQuant, arXiv:2211.10438): the product is the same, and both round well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clpl_moe.encoder import Encoder
from clpl_moe.encoder.encode import Kind, tokenize
from clpl_moe.moe.router import Router

_ALPHA = 0.5  # how much of the range of activations goes over to the weights
_MOST_TEXTS = 64


class _Smooth(nn.Module):
    """A Linear whose inputs are divided by ``scale`` (in,), and its weights multiplied by it."""

    shrink: Tensor

    def __init__(self, linear: nn.Linear, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shrink", 1 / scale)
        self.weight, self.bias = nn.Parameter(linear.weight.detach() * scale, requires_grad=False), linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs * self.shrink, self.weight, self.bias)


@torch.no_grad()
def smooth(graph: nn.Module, encoder: Encoder, texts: Sequence[str]) -> None:
    """Replace each Linear of a graph in place, by what reaches it for these texts, as queries and as passages."""
    largest: dict[str, Tensor] = {}

    def watch(name: str, linear: nn.Linear) -> RemovableHandle:
        def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            found = given[0].flatten(0, -2).abs().amax(0)
            largest[name] = torch.maximum(largest.get(name, found), found)

        return linear.register_forward_pre_hook(note)

    linears = {name: part for name, part in graph.named_modules() if isinstance(part, nn.Linear)}
    hooks = [watch(name, linear) for name, linear in linears.items()]
    kinds: tuple[Kind, ...] = ("query", "passage")
    for kind in kinds:
        for sequence in tokenize(encoder, texts[:_MOST_TEXTS], kind=kind, max_length=encoder.max_length).sequences:
            ids = torch.as_tensor(sequence)[None].long()
            graph(input_ids=ids, attention_mask=torch.ones_like(ids))
    for hook in hooks:
        hook.remove()
    for name, found in largest.items():
        linear = linears[name]
        weights = linear.weight.abs().amax(0)
        scale = found.clamp(min=1e-3) ** _ALPHA / weights.clamp(min=1e-5) ** (1 - _ALPHA)
        graph.set_submodule(name, _Smooth(linear, scale / scale.log().mean().exp()))


def quantize(source: Path, target: Path, graph: nn.Module, config: Any, external: bool) -> None:
    """Write the graph of a file with 8-bit weights; ``graph`` is what the file was made of."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = onnx.load(source, load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in nodes.initializer}
    # What enters a layer's output Linear has a few values far above the others, in some tokens, for which 8 bits leave none.
    # Routers choose between scores that are close.
    exact: set[tuple[int, ...]] = {(config.intermediate_size, config.hidden_size)}
    exact |= {tuple(part.weight.shape[::-1]) for part in graph.modules() if isinstance(part, Router)}
    kept = [node.name for node in nodes.node if node.op_type == "MatMul" and shapes.get(node.input[1]) in exact]
    quantize_dynamic(
        source,
        target,
        nodes_to_exclude=kept,
        weight_type=QuantType.QInt8,
        per_channel=True,
        use_external_data_format=external,
    )
