"""Encode texts without gradients, for corpora of any size.

1. Equal texts are encoded once.
2. Texts are tokenized a part at a time; token ids are kept as 32-bit integers.
3. Batches go from the longest text to the shortest. Each is as large as a budget of tokens allows, so that a budget that
   does not fit in memory fails at the start.
4. Each batch is one stream of tokens without padding (:mod:`clpl_moe.encoder.packing`; encoders of an unknown build get
   padded batches). It runs in bfloat16 where the device is fast at it, and embeddings are normalised in float32. On a CPU
   each core has a batch of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from clpl_moe.common.errors import UserError
from clpl_moe.encoder.cut import cut_texts
from clpl_moe.encoder.packing import PackedTexts, can_pack, embed_packed
from clpl_moe.encoder.precision import autocast, onednn_linear
from clpl_moe.encoder.settings import check_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from clpl_moe.encoder.encoder import Encoder

_TOKENIZE_AT_ONCE = 4096
_MOST_BATCHES_AT_ONCE = 16  # on a CPU; each needs memory of its own
_LEAST_TOKENS_A_CORE = _LEAST_WIDTH = 256

Kind = Literal["query", "passage"]


def encode(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    kind: Kind,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> Tensor:
    """:meth:`Encoder.encode_queries` or :meth:`Encoder.encode_passages`, by ``kind``.

    The model's mode and the global random state stay as they were. Threads may share a model in evaluation mode.
    """
    label = {"query": "queries", "passage": "passages"}[kind]
    max_length = encoder.max_length if max_length is None else max_length
    check_length(encoder.model, max_length)
    tokenized = tokenize(encoder, texts, kind=kind, max_length=max_length, label=label if progress else None)
    bar = tqdm(total=len(tokenized.sequences), desc=f"encode {label}", unit=kind, disable=not progress, leave=False)
    with bar:
        return check_finite(encode_tokenized(encoder, tokenized, batch_tokens=batch_tokens, on_batch=bar.update))


@dataclass
class TokenizedTexts:
    """Texts as token ids."""

    sequences: list[np.ndarray]  # the token ids of each distinct text, an int32 array each
    places: np.ndarray  # for each text its place in ``sequences``


def tokenize(
    encoder: Encoder, texts: Iterable[str], *, kind: Kind, max_length: int, label: str | None = None
) -> TokenizedTexts:
    """The first half of :func:`encode`, whose arguments it takes; with a bar where that has a label."""
    numbers: dict[str, int] = {}
    places = np.fromiter((numbers.setdefault(text, len(numbers)) for text in texts), dtype=np.int64)
    tokenizer, prompt, unique = encoder.tokenizer, encoder.settings.prompt(kind), list(numbers)
    sequences: list[np.ndarray] = []
    with tqdm(total=len(unique), desc=f"tokenize {label}", unit="text", disable=label is None, leave=False) as bar:
        for start in range(0, len(unique), _TOKENIZE_AT_ONCE):
            part = [prompt + text for text in unique[start : start + _TOKENIZE_AT_ONCE]]
            part = cut_texts(tokenizer, part, max_length)
            encoded = tokenizer(
                part, truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
            )
            # A tokenizer without special tokens finds none in an empty text: it is then one of padding.
            empty = [tokenizer.pad_token_id or 0]
            sequences += [np.asarray(ids or empty, dtype=np.int32) for ids in encoded["input_ids"]]
            bar.update(len(part))
    return TokenizedTexts(sequences, places)


def encode_tokenized(
    encoder: Encoder,
    texts: TokenizedTexts,
    *,
    batch_tokens: int | None = None,
    on_batch: Callable[[int], object] = lambda texts: None,
) -> Tensor:
    """The second half of :func:`encode`; ``on_batch`` is told of so many distinct texts done."""
    model = encoder.model
    batch_tokens = default_batch_tokens(model) if batch_tokens is None else batch_tokens
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, found {batch_tokens}")
    sequences = texts.sequences
    workers = _batches_at_once(model, sequences)
    if workers > 1:
        todo = _even_batches(sequences, batch_tokens, workers)
    else:
        todo = list(batches(sequences, batch_tokens, padded=not can_pack(model)))
    embeddings = torch.empty(len(sequences), encoder.dimensions)
    linear = onednn_linear(model, encoder.dtype)

    def run(batch: list[int]) -> Tensor:
        own = [sequences[i] for i in batch]
        with refuse_too_large(own, model.device, batch_tokens), torch.inference_mode(), linear:
            return _embed(encoder, own)

    outputs = _map_on_cores(run, todo, workers) if workers > 1 else (run(batch) for batch in todo)
    pending: Callable[[], None] | None = None
    with _evaluation_mode(model), contextlib.closing(outputs):
        for batch, output in zip(todo, outputs):
            # The batch before is taken off the device now, while the device works on this one.
            if pending is not None:
                pending()
            pending = _fetch(output, embeddings, batch)
            on_batch(len(batch))
    if pending is not None:
        pending()
    return embeddings if len(sequences) == len(texts.places) else embeddings[torch.from_numpy(texts.places)]


def check_finite(embeddings: Tensor) -> Tensor:
    """Give embeddings (n, D) back; :class:`UserError` where some are NaN or infinite, since a ranking by them is noise."""
    if broken := int((~torch.isfinite(embeddings).all(dim=1)).sum()):
        fault = f"the encoder gives NaN or infinite embeddings ({broken} of {len(embeddings)} texts)"
        raise UserError(f"{fault}: its weights are broken, or the precision is too low for them (try float32)")
    return embeddings


@contextlib.contextmanager
def refuse_too_large(batch: Sequence[np.ndarray], device: torch.device, batch_tokens: int) -> Iterator[None]:
    """Raise :class:`UserError` where a batch, its longest text first, does not fit in memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        fault = f"{len(batch)} texts of up to {len(batch[0])} tokens do not fit in the memory of {device}"
        raise UserError(f"{fault}: lower the tokens a batch, now {batch_tokens}") from None


def default_batch_tokens(model: PreTrainedModel) -> int:
    """The tokens of a batch that suit a model's device."""
    return 2048 if model.device.type == "cpu" else 16384


def batches(sequences: list[np.ndarray], batch_tokens: int, padded: bool) -> Iterator[list[int]]:
    """Indices of each batch, longest sequences first."""
    batch: list[int] = []
    tokens = 0
    for index in _longest_first(sequences):
        # A padded batch is as wide as its first sequence, the longest.
        width = len(sequences[batch[0]]) if padded and batch else len(sequences[index])
        if batch and tokens + width > batch_tokens:
            yield batch
            batch, tokens, width = [], 0, len(sequences[index])
        batch.append(index)
        tokens += width
    if batch:
        yield batch


def _longest_first(sequences: list[np.ndarray]) -> list[int]:
    return sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))


def _batches_at_once(model: PreTrainedModel, sequences: list[np.ndarray]) -> int:
    """How many batches are under way, each on cores of its own; 1 on a GPU, and where it would not help."""
    # Encoders that are not run from here may keep something of a pass in themselves; toys would wait for Python's lock.
    if model.device.type != "cpu" or not can_pack(model) or model.config.hidden_size < _LEAST_WIDTH:
        return 1
    tokens = sum(map(len, sequences))
    return max(1, min(torch.get_num_threads(), _MOST_BATCHES_AT_ONCE, tokens // _LEAST_TOKENS_A_CORE))


def _even_batches(sequences: list[np.ndarray], batch_tokens: int, workers: int) -> list[list[int]]:
    """:func:`batches` without padding, about as large as each other and as many for each worker: none waits at the end."""
    order = _longest_first(sequences)
    ends = np.cumsum([len(sequences[i]) for i in order])
    longest, tokens = len(sequences[order[0]]), ends[-1]
    room = batch_tokens - longest  # a batch ends with the text that reaches its share
    if room < longest:
        return list(batches(sequences, batch_tokens, padded=False))
    number = workers * math.ceil(tokens / (workers * room))
    shares = tokens * np.arange(1, number) / number
    parts = np.split(order, np.searchsorted(ends, shares) + 1)
    return [part.tolist() for part in parts if len(part)]


def _embed(encoder: Encoder, sequences: list[np.ndarray]) -> Tensor:
    """(B, D) float32 on the model's device, which may still be computing it."""
    model, settings = encoder.model, encoder.settings
    texts = PackedTexts.from_sequences(sequences).to(model.device)
    with autocast(model, encoder.dtype):
        embeddings = embed_packed(model, texts, pooling=settings.pooling, normalize=settings.normalize)
        return settings.truncate(embeddings.float())


def _fetch(output: Tensor, embeddings: Tensor, rows: list[int]) -> Callable[[], None]:
    """Begin to copy ``output`` off its device; the function returned waits for it and puts it into ``rows``."""
    host = output.to("cpu", non_blocking=True)
    done = None
    if output.device.type == "cuda":
        done = torch.cuda.Event()
        done.record()

    def put() -> None:
        if done is not None:
            done.synchronize()
        embeddings[rows] = host

    return put


def _map_on_cores(
    function: Callable[[list[int]], Tensor], batches: Sequence[list[int]], workers: int
) -> Generator[Tensor]:
    """``map`` with several batches at a time, among which torch's threads are divided: all threads on one batch wait for
    each other after every operation. Until it ends, the whole process has so many threads for each operation of torch."""
    threads = torch.get_num_threads()
    each = threads // workers
    torch.set_num_threads(each)
    executor = ThreadPoolExecutor(workers, "encode", initializer=torch.set_num_threads, initargs=(each,))
    try:
        yield from executor.map(function, batches)
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; then the mode that each module was in (frozen ones may differ)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
