"""Embeddings of a corpus on disk, in shards that survive a kill.

1. A hash of weights, tokenizer, settings and texts names the folder. Other content has another folder, so existing shards
   are always valid.
2. The texts are cut into shards. A thread reads and tokenizes the next shard while the encoder works on the current one.
3. The embeddings of a shard are written in 16-bit floats to a file that gets its name when it is complete. Only missing
   shards are computed: an interrupted job goes on where it stopped.
4. All processes that encode into a folder share its missing shards, whether ``torchrun`` started them or each was started by
   itself, on one machine or on several with a common file system (:mod:`clpl_moe.retrieval.claims`). The shards of a
   process that dies fall to the others. Each process waits until all shards are there, and reads all.

Memory holds the texts and token ids of two shards, whatever the size of the corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open, refuse_unwritable, write_json
from clpl_moe.encoder.encode import check_finite, encode_tokenized, tokenize
from clpl_moe.encoder.settings import check_length
from clpl_moe.retrieval.claims import Claims
from clpl_moe.retrieval.collection import hash_texts

if TYPE_CHECKING:
    from clpl_moe.encoder import Encoder
    from clpl_moe.retrieval.options import EncodingArguments

_LOOKS = 1.0  # seconds between two looks at what other processes have left to do

SHARD_TEXTS = 4096  # what a kill loses at most, a second on a large GPU and minutes on a CPU


class EmbeddingShards:
    """The embeddings of N texts in the files of a folder, read on access.

    ``shards[start:stop]`` is a float16 tensor (stop - start, D), ``shards[[row, …]]`` a float32 one (rows, D), both on the
    CPU.
    """

    def __init__(self, folder: Path, length: int, dimensions: int) -> None:
        self.folder = folder
        self.shape = torch.Size([length, dimensions])
        self.encoded = 0  # texts by this process; the others were found or encoded by other processes

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def count(self) -> int:
        """The number of shards."""
        return math.ceil(len(self) / SHARD_TEXTS)

    def rows(self, number: int) -> range:
        """The texts of a shard."""
        return range(len(self))[number * SHARD_TEXTS : (number + 1) * SHARD_TEXTS]

    def file(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{number:06d}.npy"

    def has(self, number: int) -> bool:
        """Whether a shard's file is complete."""
        with contextlib.suppress(OSError, ValueError, EOFError):
            found = np.load(self.file(number), mmap_mode="r")
            return found.dtype == np.float16 and found.shape == (len(self.rows(number)), self.shape[1])
        return False

    def write(self, number: int, embeddings: Tensor) -> None:
        """Store a shard, (rows, D) in float16."""
        with atomic_open(self.file(number), "wb") as file:
            np.save(file, embeddings.numpy())

    def __getitem__(self, index: slice | Sequence[int]) -> Tensor:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"embeddings are read one after another, found a step of {step}")
            parts = [np.empty((0, self.shape[1]), np.float16)]
            while start < stop:
                number, first = divmod(start, SHARD_TEXTS)
                end = min(stop, self.rows(number).stop)
                parts.append(np.load(self.file(number), mmap_mode="r")[first : first + end - start])
                start = end
            return torch.from_numpy(np.concatenate(parts))
        return self.gather(torch.as_tensor(index, dtype=torch.int64).numpy(), np.float32)

    def gather(self, rows: np.ndarray, dtype: type[np.floating]) -> Tensor:
        """Some rows (R,), as (R, D)."""
        found = np.empty((len(rows), self.shape[1]), dtype)
        for number in np.unique(rows // SHARD_TEXTS):
            here = rows // SHARD_TEXTS == number
            found[here] = np.load(self.file(number), mmap_mode="r")[rows[here] % SHARD_TEXTS]
        return torch.from_numpy(found)


class EmbeddingRows:
    """Some rows of :class:`EmbeddingShards`, read as these are; ``rows`` (N,) are ascending."""

    def __init__(self, shards: EmbeddingShards, rows: np.ndarray) -> None:
        self.shards, self.rows = shards, rows
        self.shape = torch.Size([len(rows), shards.shape[1]])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | Sequence[int]) -> Tensor:
        if isinstance(index, slice):
            return self.shards.gather(self.rows[index], np.float16)
        return self.shards[self.rows[torch.as_tensor(index, dtype=torch.int64).numpy()]]


Embeddings: TypeAlias = Tensor | EmbeddingShards | EmbeddingRows  # (N, D), read by rows


def encode_queries(
    encoder: Encoder, texts: Sequence[str], encoding: EncodingArguments, *, progress: bool = True
) -> Tensor:
    """:meth:`Encoder.encode_queries` as a command's options say: (n, D) float32 on the CPU."""
    length = encoding.query_max_len
    check_length(encoder.model, length, "query_max_len")
    return encoder.encode_queries(texts, max_length=length, batch_tokens=encoding.batch_tokens, progress=progress)


def encode_passages(
    encoder: Encoder,
    texts: Sequence[str],
    encoding: EncodingArguments,
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> Tensor | EmbeddingShards:
    """Embed passages in memory or, with ``cache``, in a folder of shards within it, of which only missing ones are computed.

    With ``cache``, texts are read several times, front to back, and other processes that embed the same share the work. With
    ``torch.distributed``, all processes have to call this. ``progress`` also prints how many shards were found.

    Returns:
        (N, D): a float32 tensor on the CPU, or shards, in 16-bit floats.

    Raises:
        UserError: as in :meth:`Encoder.encode_passages`; also, the disk has no room or the processes see different disks.
    """
    length, batch_tokens = encoding.passage_max_len, encoding.batch_tokens
    check_length(encoder.model, length, "passage_max_len")
    if cache is None:
        return encoder.encode_passages(texts, max_length=length, batch_tokens=batch_tokens, progress=progress)
    rank, world = process()
    shards = _open(encoder, texts, length, cache)
    _wait()  # for the folder
    if not shards.folder.is_dir():
        raise UserError(f"{at(shards.folder)}: not found, although another process made it; all need the same disk")
    missing = [number for number in range(shards.count) if not shards.has(number)]
    _wait()  # until all processes have the same list
    progress = progress and rank == 0
    if progress:
        found = f"{shards.count - len(missing):,} of {shards.count:,} shards found"
        print(f"embeddings in {shards.folder}: {found}", flush=True)  # also where the job is killed
    unseen = deque(missing)  # in this round over what is missing
    unseen.rotate(-rank * len(unseen) // world)

    def read(number: int):
        rows = shards.rows(number)
        return tokenize(encoder, texts[rows.start : rows.stop], kind="passage", max_length=length)

    def begin() -> tuple[int, Future] | None:
        """Claim a shard and begin to read its texts; None where all that are missing are other processes'."""
        while unseen:
            number = unseen.popleft()
            if not shards.has(number) and claims.take(number):
                if not shards.has(number):
                    return number, thread.submit(read, number)
                claims.release(number)  # finished meanwhile
            elif unseen:
                unseen.rotate(-random.randrange(len(unseen)))  # away from where another process is
        return None

    def still_missing() -> list[int]:
        left = [number for number in missing if not shards.has(number)]
        bar.n = total - sum(len(shards.rows(number)) for number in left)
        bar.refresh()
        return left

    total = sum(len(shards.rows(number)) for number in missing)
    bar = tqdm(total=total, desc="encode passages", unit="passage", disable=not progress, leave=False)
    with bar, Claims(shards.folder) as claims, ThreadPoolExecutor(1) as thread:
        while missing:
            current = begin()
            while current is not None:
                following = begin()
                number, texts_read = current
                tokenized = texts_read.result()
                embeddings = encode_tokenized(encoder, tokenized, batch_tokens=batch_tokens, on_batch=bar.update).half()
                shards.write(number, check_finite(embeddings))
                claims.release(number)
                shards.encoded += len(embeddings)
                bar.update(len(embeddings) - len(tokenized.sequences))  # equal texts were encoded once
                current = following
            if missing := still_missing():
                time.sleep(_LOOKS)
                unseen.extend(missing)
    _wait()
    return shards


def _open(encoder: Encoder, texts: Sequence[str], length: int, cache: Path) -> EmbeddingShards:
    """The shards' folder, made by the first process, with a file that says what they are."""
    content = {
        "what": "embeddings of passages, made by clpl_moe; they can be deleted at any time",
        "model_hash": encoder.fingerprint(),
        "texts_hash": hash_texts(texts),
        "pooling": encoder.settings.pooling,
        "normalize": encoder.settings.normalize,
        "prompt": encoder.settings.passage_prompt,
        "max_length": length,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "texts": len(texts),
        "dimensions": encoder.dimensions,
        "texts_per_shard": SHARD_TEXTS,
    }
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    shards = EmbeddingShards(cache / name, len(texts), encoder.dimensions)
    if process()[0] == 0:
        manifest = shards.folder / "manifest.json"
        refuse_unwritable(manifest)
        if not manifest.exists():
            needed = 2 * math.prod(shards.shape)
            there = next(folder for folder in manifest.absolute().parents if folder.is_dir())
            if needed > (free := shutil.disk_usage(there).free):
                fault = f"the embeddings take {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB"
                raise UserError(f"{at(cache)}: {fault}; name a folder on another one by cache_dir")
            write_json(manifest, content)
    return shards


@contextlib.contextmanager
def cache_folder(encoding: EncodingArguments, beside: Path) -> Iterator[Path]:
    """The folder where a command keeps embeddings: the user's, or else ``beside``, which goes at the end of the block.

    After an interruption it stays, and the same command goes on from there.
    """
    if encoding.cache_dir is not None:
        yield Path(encoding.cache_dir)
        return
    yield beside
    if process()[0] == 0:
        shutil.rmtree(beside, ignore_errors=True)


def process() -> tuple[int, int]:
    """This process's rank, and how many processes there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def processes() -> Iterator[bool]:
    """Join the processes that ``torchrun`` started, if it did, each on its GPU; yields whether this one writes results."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield process()[0] == 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # Processes only wait for each other, sometimes for long: while the first one searches.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield process()[0] == 0
    finally:
        dist.destroy_process_group()


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
