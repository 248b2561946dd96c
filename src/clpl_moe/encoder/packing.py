"""Texts of different lengths encoded in one stream of tokens, without padding.

1. The token ids of all texts stand in a row (T,), each text's positions count from its own start.
2. Embeddings, projections and FFNs see the stream (1, T, D); only attention has to know where a text ends. On CUDA, in
   half precision, one variable-length flash attention does all texts; elsewhere texts of equal length, which lie side by
   side, are one batch of attention without a mask (:mod:`.attention`).
3. Frozen layers below the first trained one run without a graph, also under gradient checkpointing, where transformers
   makes the embeddings require gradients.
4. Casts for autocast, the sum with the residual and layer norm are one pass on a GPU (:mod:`.add_norm`).
5. Of the last layer, CLS and last-token pooling need one row a text: queries, attention output and FFN are computed for
   these rows only, keys and values for all.
6. What the frozen layers give for a text may be kept (:mod:`.frozen_cache`). They then have no dropout, kept or not.

The layers of XLM-R, RoBERTa and BERT are run from here, module by module, instead of through the encoder's ``forward``
with an attention function registered in transformers: gradient checkpointing runs a layer again in the backward pass,
when such a setting would have been put back, and the last two points cannot be said in it. Weights, adapters and experts
within the modules work as ever, and so do layers that FSDP2 divides among processes. Other encoders, layers that something
wraps, and encoders that DeepSpeed's ZeRO-3 divides get padded batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from types import MethodType
from typing import Any, TypeGuard, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn.attention.varlen import varlen_attn
from transformers import BertModel, PreTrainedModel, RobertaModel, XLMRobertaModel
from transformers.models.bert import modeling_bert as bert
from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta as xlmr

from clpl_moe.encoder.attention import attention
from clpl_moe.encoder.frozen_cache import frozen_cache_of
from clpl_moe.encoder.settings import check_pooling, pool
from clpl_moe.moe.dispatch import cast, linear_dtype
from clpl_moe.moe.kernel_choice import triton_compiles
from clpl_moe.moe.layer import RoutedOutput, RoutedTokens

add_norm: Callable[..., tuple[Tensor, ...]] | None = None
with contextlib.suppress(ImportError):  # of Triton, which torch's CPU builds lack
    import clpl_moe.encoder.add_norm as kernel

    add_norm = kernel.add_norm

StockEncoder = XLMRobertaModel | RobertaModel | BertModel
StockEmbeddings = xlmr.XLMRobertaEmbeddings | roberta.RobertaEmbeddings | bert.BertEmbeddings
StockLayer = xlmr.XLMRobertaLayer | roberta.RobertaLayer | bert.BertLayer
StockAttention = xlmr.XLMRobertaSelfAttention | roberta.RobertaSelfAttention | bert.BertSelfAttention
AttentionOutput = xlmr.XLMRobertaSelfOutput | roberta.RobertaSelfOutput | bert.BertSelfOutput
StockOutput = AttentionOutput | xlmr.XLMRobertaOutput | roberta.RobertaOutput | bert.BertOutput | RoutedOutput
_ENCODERS, _EMBEDDINGS, _LAYERS, _ATTENTIONS, _OUTPUTS = map(
    get_args, (StockEncoder, StockEmbeddings, StockLayer, StockAttention, StockOutput)
)


class PackedTexts:
    """n texts as one stream of T tokens.

    Attributes:
        input_ids: (T,) int64, on any device.
        lengths: (n,) int64, each at least 1; always on the CPU, so that reading them waits for no device.
        offsets: (n + 1,) int64 beside ``input_ids``: where each text begins, and T. Follows from ``lengths``.
        experts: (n,) int64 on the CPU, the expert that is given for each text; None where none is.
    """

    def __init__(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        offsets: Tensor | None = None,
        experts: Tensor | None = None,
        host_ids: Tensor | None = None,
    ) -> None:
        self.input_ids = input_ids
        self._host_ids = host_ids
        self.lengths = lengths
        self.experts = experts
        self.offsets = send(F.pad(lengths.cumsum(0), (1, 0)), input_ids.device) if offsets is None else offsets

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int] | np.ndarray]) -> PackedTexts:
        """Pack token ids of texts, special tokens included; on the CPU; ValueError where a text has none."""
        lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        if empty := (lengths == 0).nonzero().flatten().tolist():
            raise ValueError(f"text {empty[0]} has no tokens: a packed text has one at least")
        parts = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        return cls(torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts])), lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def host_ids(self) -> Tensor:
        """``input_ids`` on the CPU; texts that came from there have kept them, so that reading them waits for no device."""
        return self.input_ids.cpu() if self._host_ids is None else self._host_ids

    def select(self, rows: Tensor | np.ndarray | Sequence[int]) -> PackedTexts:
        """The texts of these numbers (m,), in this order; repeated ones are repeated. Numbers are taken on the CPU."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        lengths = self.lengths[rows]
        starts = (self.lengths.cumsum(0) - self.lengths)[rows]
        # Each token's place: its text's start here, plus its distance from the text's start there.
        shift = (starts - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        index = shift + torch.arange(len(shift))
        experts = None if self.experts is None else self.experts[rows]
        host_ids = None if self._host_ids is None else self._host_ids[index]
        return PackedTexts(self.input_ids[send(index, self.input_ids.device)], lengths, None, experts, host_ids)

    def to(self, device: torch.device | str) -> PackedTexts:
        """The same with ``input_ids`` and ``offsets`` on ``device``; without waiting for it."""
        host_ids = self.input_ids if self.input_ids.device.type == "cpu" else self._host_ids
        ids, offsets = send(self.input_ids, device), send(self.offsets, device)
        return PackedTexts(ids, self.lengths, offsets, self.experts, host_ids)

    def pin_memory(self) -> PackedTexts:
        """The same in page-locked memory; data loaders call it."""
        return PackedTexts(self.input_ids.pin_memory(), self.lengths, self.offsets.pin_memory(), self.experts)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``, copied without waiting: for that its memory has to be page-locked."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def can_pack(encoder: nn.Module) -> TypeGuard[StockEncoder]:
    """Whether :func:`embed_packed` runs ``encoder`` without padding: XLM-R, RoBERTa or BERT, also with experts."""
    # Exact classes: a subclass may compute something else. With experts, it is the stock classes' forward.
    if not isinstance(encoder, _ENCODERS) or type(encoder).forward not in [stock.forward for stock in _ENCODERS]:
        return False
    if encoder.config.is_decoder or _kind(encoder.embeddings) not in _EMBEDDINGS:
        return False
    if hasattr(encoder.embeddings.word_embeddings.weight, "ds_id"):  # of ZeRO-3, which looks at calls of whole layers
        return False
    layers = _layers(encoder)
    are_stock = all(_kind(layer) in _LAYERS and type(layer.attention.self) in _ATTENTIONS for layer in layers)
    return are_stock and len(layers) == len(encoder.encoder.layer)


def _kind(module: nn.Module) -> type:
    """A module's class; of one that FSDP2 divides, which gets a class of its own, the class that it had."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def _layers(encoder: StockEncoder) -> list[StockLayer]:
    return [layer for layer in encoder.encoder.layer if isinstance(layer, StockLayer)]


def embed_packed(encoder: PreTrainedModel, packed: PackedTexts, *, pooling: str, normalize: bool = False) -> Tensor:
    """Embed n texts in one pass of the encoder, in its mode (training or evaluation) and under the caller's autocast.

    The texts are on the encoder's device, and none is longer than its positions. They need no order, but texts of equal
    length side by side need not be moved. Where :func:`can_pack` says no, they are padded to the longest.

    Embeddings and gradients are those of padded batches. With CLS or last-token pooling, routers of the last layer see
    only the tokens that are pooled, so that its balance loss and load count these.

    Returns:
        (n, D) in at least float32, in the order of ``packed``.

    Raises:
        ValueError: unknown ``pooling``.
    """
    check_pooling(pooling)
    if len(packed) == 0:
        return torch.zeros(0, encoder.config.hidden_size, device=packed.input_ids.device)
    if can_pack(encoder):
        embeddings = _embed_stream(encoder, packed, pooling)
    else:
        embeddings = _embed_padded(encoder, packed, pooling)
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return F.normalize(embeddings, dim=-1) if normalize else embeddings


def _embed_padded(encoder: PreTrainedModel, packed: PackedTexts, pooling: str) -> Tensor:
    mask = torch.arange(int(packed.lengths.max())) < packed.lengths.unsqueeze(1)  # (n, L)
    mask = mask.to(packed.input_ids.device)
    ids = torch.full(mask.shape, getattr(encoder.config, "pad_token_id", None) or 0, device=mask.device)
    ids[mask] = packed.input_ids
    mask = mask.long()
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (n, L, D)
    return pool(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), mask, pooling)


@dataclass
class _Stream:
    """The texts as attention sees them."""

    flash: bool  # whether variable-length flash attention does all texts at once
    offsets: Tensor  # (n + 1,) int32 on the device
    longest: int  # tokens of the longest text
    runs: list[tuple[int, int]]  # length and number of neighbouring texts of equal length
    experts: Tensor | None  # (T,) int64 on the device, each token's expert, where it is given


def _embed_stream(encoder: StockEncoder, packed: PackedTexts, pooling: str) -> Tensor:
    flash = _flash_fits(encoder, packed.input_ids.device)
    order = None
    if not flash and len(packed.lengths.unique_consecutive()) > len(packed.lengths.unique()):
        order = packed.lengths.argsort(stable=True)
        packed = packed.select(order)
    stream = _stream_of(packed, flash)
    rows = {"cls": packed.offsets[:-1], "last_token": packed.offsets[1:] - 1, "mean": None}[pooling]  # (n,)
    layers = _layers(encoder)
    parts = [encoder.embeddings, *layers]
    trained = [any(parameter.requires_grad for parameter in part.parameters()) for part in parts]
    graph = torch.is_grad_enabled()
    cache = frozen_cache_of(encoder)
    done = 0 if cache is None else cache.layers
    with _running(encoder):
        with torch.set_grad_enabled(graph and any(trained[: done + 1])):
            if cache is None:
                states = _embed_tokens(encoder, packed)
            else:
                precision = linear_dtype(encoder.embeddings.word_embeddings.weight)
                states = cache.states(packed, partial(_frozen_states, encoder, done, flash), precision=precision)
                states = states.to(encoder.dtype).unsqueeze(0)
            hidden = _with_cast(states)  # (1, T, D)
        for number, layer in enumerate(layers[done:], done + 1):
            with torch.set_grad_enabled(graph and any(trained[: number + 1])):
                # The last one returns (1, n, D), or (1, T, D) for the mean.
                hidden = _run(layer)(hidden, stream, rows if number == len(layers) else None)
    embeddings = hidden[0].squeeze(0)
    if pooling == "mean":
        wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        # unsafe leaves out checks that would wait for the device.
        embeddings = torch.segment_reduce(wide, "mean", offsets=packed.offsets, axis=0, unsafe=True)
    return embeddings if order is None else embeddings[send(order.argsort(), embeddings.device)]


def _stream_of(packed: PackedTexts, flash: bool) -> _Stream:
    lengths = packed.lengths.tolist()
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    experts = None
    if packed.experts is not None:
        experts = send(packed.experts.repeat_interleave(packed.lengths), packed.input_ids.device)
    return _Stream(flash, packed.offsets.int(), max(lengths), runs, experts)


def _embed_tokens(encoder: StockEncoder, packed: PackedTexts) -> Tensor:
    """(1, T, D), the input of the first layer."""
    ids, positions = packed.input_ids.unsqueeze(0), _positions(encoder, packed).unsqueeze(0)
    return encoder.embeddings(input_ids=ids, position_ids=positions)


def _frozen_states(encoder: StockEncoder, number: int, flash: bool, packed: PackedTexts) -> Tensor:
    """(T, D) after so many layers, in evaluation mode and without a graph."""
    stream, layers = _stream_of(packed, flash), _layers(encoder)[:number]
    training = [module for part in (encoder.embeddings, *layers) for module in part.modules() if module.training]
    for module in training:
        module.training = False
    try:
        # Without the other Linear layers of encoding, whose last bits differ: training and evaluation give equal states.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            hidden = _with_cast(_embed_tokens(encoder, packed))
            for layer in layers:
                hidden = _run_layer(layer, hidden, stream, None)
    finally:
        for module in training:
            module.training = True
    return hidden[0].squeeze(0)


def _positions(encoder: StockEncoder, packed: PackedTexts) -> Tensor:
    """(T,) int64, the position of each token as the encoder's own embeddings count it."""
    ids, starts = packed.input_ids, packed.offsets[:-1]
    # The first token of each token's text; with the size given, the device is not waited for.
    first = starts.repeat_interleave(packed.offsets.diff(), output_size=len(ids))  # (T,)
    padding = getattr(encoder.embeddings, "padding_idx", None)
    if padding is None:
        return torch.arange(len(ids), device=ids.device) - first
    # XLM-R and RoBERTa count from the padding's number on, and do not count a padding token that stands in a text.
    counted = ids.ne(padding)
    through = counted.cumsum(0)
    before = through - counted.long()
    return (through - before[first]) * counted + padding


def _run(layer: StockLayer) -> Callable[..., tuple[Tensor, ...]]:
    """:func:`_run_layer` of this layer; where FSDP2 divides its weights, they are gathered for it."""
    if not isinstance(layer, FSDPModule):
        return partial(_run_layer, layer)
    divided: Any = layer
    if not hasattr(divided, "run_packed"):
        divided.run_packed = MethodType(_run_layer, divided)
        register_fsdp_forward_method(divided, "run_packed")
    return divided.run_packed


def _run_layer(
    layer: StockLayer, hidden: tuple[Tensor, ...], stream: _Stream, rows: Tensor | None
) -> tuple[Tensor, ...]:
    """One transformer layer, (1, T, D) to (1, T, D), or to (1, n, D) for ``rows`` (n,), one token of each text.

    Hidden states come and go in layer norm's dtype and, where it is another, in autocast's: so they are cast only once.
    """
    if not (layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()):
        return _layer(layer, stream, rows, *hidden)
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)  # transformers sets both attributes together
    assert checkpoint is not None
    if not hidden[0].requires_grad and getattr(checkpoint, "keywords", {}).get("use_reentrant", True):
        hidden = hidden[0].detach().requires_grad_(), *hidden[1:]  # the reentrant kind has no gradients otherwise
    return checkpoint(partial(_layer, layer, stream, rows), *hidden)


def _layer(layer: StockLayer, stream: _Stream, rows: Tensor | None, *hidden: Tensor) -> tuple[Tensor, ...]:
    for module in (layer.intermediate, layer.output):
        if (state := getattr(module, "state", None)) is not None:  # experts: every token that they are shown is real
            experts = stream.experts if rows is None or stream.experts is None else stream.experts[rows]
            state.set_tokens(None, experts)
    attention = layer.attention.self
    shape = (-1, attention.num_attention_heads, attention.attention_head_size)
    kept = hidden if rows is None else tuple(states[:, rows] for states in hidden)
    states = attention.query(kept[-1]), attention.key(hidden[-1]), attention.value(hidden[-1])
    query, key, value = (each.view(shape) for each in states)  # (T or n, heads, d), (T, heads, d)
    dropout = attention.dropout.p if attention.training else 0.0
    attend = _flash_attention if stream.flash else _grouped_attention
    context = attend(query, key, value, stream, dropout)  # (T or n, heads, d)
    kept = _close(layer.attention.output, context.reshape(1, len(query), -1), kept[0])
    return _close(layer.output, layer.intermediate(kept[-1]), kept[0])


def _with_cast(hidden: Tensor) -> tuple[Tensor, ...]:
    """Hidden states, and again in autocast's dtype where that is another."""
    return (hidden,) if linear_dtype(hidden) == hidden.dtype else (hidden, cast(hidden))


def _close(output: nn.Module, hidden: Tensor | RoutedTokens, residual: Tensor) -> tuple[Tensor, ...]:
    """A block's output module: Linear, dropout, sum with the residual (1, T, D), and layer norm."""
    if add_norm is None or not _closes_in_one_pass(output, hidden, residual):
        return _with_cast(output(hidden, residual))
    if isinstance(hidden, RoutedTokens):
        values, slots = hidden.values.unsqueeze(0), hidden.assignment.inverse
    else:
        values, slots = hidden, None
    values, norm = output.dropout(output.dense(values)), output.LayerNorm
    states = add_norm(values.squeeze(0), residual.squeeze(0), norm.weight, norm.bias, norm.eps, slots)
    return tuple(part.unsqueeze(0) for part in states)


def _closes_in_one_pass(output: nn.Module, hidden: Tensor | RoutedTokens, residual: Tensor) -> TypeGuard[StockOutput]:
    """Whether :func:`~clpl_moe.encoder.add_norm.add_norm` does: in half precision on a GPU, for modules that it knows."""
    if linear_dtype(residual) not in (torch.float16, torch.bfloat16):
        return False
    if isinstance(hidden, RoutedTokens) and (hidden.assignment.mixed or hidden.assignment.top_k > 1):
        return False
    known = type(output) in _OUTPUTS and type(output.LayerNorm) is nn.LayerNorm
    return known and not torch.compiler.is_compiling() and triton_compiles(residual.device)


def _grouped_attention(query: Tensor, key: Tensor, value: Tensor, stream: _Stream, dropout: float) -> Tensor:
    one_row = len(query) != len(key)
    counts = [count for _, count in stream.runs]
    # split rather than slices: its backward pass writes each gradient once.
    tokens = [length * count for length, count in stream.runs]
    queries = query.split(counts if one_row else tokens)
    outputs = []
    for count, q, k, v in zip(counts, queries, key.split(tokens), value.split(tokens), strict=True):
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))  # (count, heads, length or 1, d)
        outputs.append(attention(q, k, v, dropout).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, stream: _Stream, dropout: float) -> Tensor:
    offsets, longest, longest_query = stream.offsets, stream.longest, stream.longest
    query_offsets = offsets
    if len(query) != len(key):
        query_offsets = torch.arange(len(offsets), dtype=torch.int32, device=offsets.device)
        longest_query = 1
    if dropout == 0:
        return varlen_attn(query, key, value, query_offsets, offsets, longest_query, longest)  # type: ignore[return-value]
    # The public function has no dropout; this is what it calls.
    arguments = (query_offsets, offsets, longest_query, longest, dropout, False, False)
    return torch.ops.aten._flash_attention_forward(query, key, value, *arguments)[0]


def _flash_fits(encoder: StockEncoder, device: torch.device) -> bool:
    """Whether torch's variable-length flash attention takes this encoder's queries, keys and values."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    attention = _layers(encoder)[0].attention.self
    dtype = linear_dtype(attention.query.weight)
    width = attention.attention_head_size
    fits = dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)


@contextlib.contextmanager
def _running(encoder: StockEncoder) -> Iterator[None]:
    """Tells experts that this is the pass itself, and not what checkpointing repeats of it."""
    halves: list[Any] = [half for layer in _layers(encoder) for half in (layer.intermediate, layer.output)]
    states = [half.state for half in halves if hasattr(half, "router")]
    for state in states:
        state.set_running(True)
    try:
        yield
    finally:
        for state in states:
            state.set_running(False)
