"""The options that commands share which encode text and search, and the encoder that they ask for."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clpl_moe.common.errors import OptionError
from clpl_moe.common.files import refuse_unwritable
from clpl_moe.common.options import check_bounds, check_needs, check_outputs, given, option

if TYPE_CHECKING:
    from torch import nn

    from clpl_moe.encoder import Encoder

Quantization = Literal["int8", "binary"]


@dataclass
class EncodingArguments:
    """How texts become embeddings, and how these are searched."""

    query_max_len: int = option("longest query in tokens; the rest is cut off", 128, least=3, most=1_000_000)
    passage_max_len: int = option("longest passage in tokens; the rest is cut off", 512, least=3, most=1_000_000)
    batch_tokens: int | None = option(
        "tokens a batch (on a CPU each core has one); not given: 2048 on a CPU, 16384 on a GPU",
        None,
        least=1,
        most=1_000_000_000,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "precision; auto: bfloat16 where the hardware is fast at it, else float32", "auto"
    )
    pooling: Literal["cls", "mean", "last_token"] | None = option(
        "pooling, instead of what the model folder says", None
    )
    query_prompt: str | None = option("text in front of each query, instead of what the model folder says", None)
    passage_prompt: str | None = option("text in front of each passage, instead of what the model folder says", None)
    cache_dir: str | None = option(
        "folder where the corpus's embeddings (2 bytes a value) stay for later calls with the same model and"
        " corpus; not given: the output's work folder, deleted once the output is written. In both an"
        " interrupted encoding goes on where it stopped",
        None,
    )
    expert: int | None = option(
        "with router given: the expert that all texts go to, instead of the one that the model folder names",
        None,
        least=0,
        most=1_023,
    )
    truncate_dim: int | None = option(
        "only the first so many dimensions of embeddings, instead of what the model folder says; for models trained with"
        " matryoshka_dims",
        None,
        least=1,
        most=1_048_576,
    )
    quantize: Quantization | None = option(
        "search on embeddings of 8 bits or 1 bit a value, in memory, and score what is found again by the whole embeddings;"
        " not given: exact search",
        None,
    )
    index: Literal["exact", "approximate"] = option(
        "approximate: search in an index of faiss (extra ann), for very many passages and queries, and score what is found"
        " again by the whole embeddings; its recall is printed",
        "exact",
    )
    index_recall: float = option(
        "with index approximate: share of what an exact search finds that a sample of the queries has to find",
        0.95,
        least=0.01,
        most=1,
    )
    oversampling: int = option(
        "with quantize or index approximate: how many times as many passages as asked for are found and scored again; an"
        " approximate index takes more where it needs them for index_recall",
        4,
        least=1,
        most=1_000,
    )
    trust_remote_code: bool = option("run code that the model's own folder holds; look at it first", False)

    def __post_init__(self) -> None:
        # Two tokens only begin and end a text, and a tokenizer that is to cut off more cuts nothing.
        check_bounds(self)
        check_needs(self, {"index_recall": "index approximate"})
        if "oversampling" in given(self) and self.quantize is None and self.index == "exact":
            raise OptionError("oversampling", "goes with quantize or index approximate; neither is set")
        if self.index == "approximate":
            if self.quantize is not None:
                raise OptionError("index", "approximate has codes of its own; leave out quantize")
            if importlib.util.find_spec("faiss") is None:
                raise OptionError("index", 'approximate needs faiss; install it with: pip install "clpl-moe[ann]"')
        if self.cache_dir is not None:
            check_outputs(self, "cache_dir")
            refuse_unwritable(Path(self.cache_dir, "embeddings"))

    def refuse_search(self, instead: str) -> None:
        """Raise :class:`OptionError` for an option of the search that was given to a command without one: what it does
        ``instead``."""
        for name in ("quantize", "index"):
            if name in given(self):
                raise OptionError(name, f"goes with a search, and here is none: {instead}")

    def describe(self, encoder: Encoder) -> dict[str, Any]:
        """Everything but an encoder's weights and the texts that decides the embeddings."""
        lengths = {"query_max_len": self.query_max_len, "passage_max_len": self.passage_max_len}
        settings = dataclasses.asdict(encoder.settings)
        if settings["truncate_dim"] is None:  # results of before do not have it
            del settings["truncate_dim"]
        return settings | lengths | {"dtype": str(encoder.dtype).removeprefix("torch.")}

    def describe_search(self) -> dict[str, Any]:
        """Everything that decides what a search finds, besides the embeddings; nothing for an exact one."""
        if self.index == "approximate":
            return {"index": self.index, "index_recall": self.index_recall, "oversampling": self.oversampling}
        return {} if self.quantize is None else {"quantize": self.quantize, "oversampling": self.oversampling}


def open_encoder(name: str, arguments: EncodingArguments, revision: str | None = None) -> Encoder:
    """Load an encoder by folder or hub name, there of a revision, on a CUDA device where there is one; :class:`UserError`
    if that fails."""
    import torch

    from clpl_moe.common.allocator import keep_freed_memory
    from clpl_moe.encoder import Encoder

    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    encoder = Encoder.load(name, trust_remote_code=arguments.trust_remote_code, compute_dtype=dtype, revision=revision)
    names = ("pooling", "query_prompt", "passage_prompt")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    # Similarity is the cosine, as in training, also where the folder leaves the normalisation to its user.
    encoder.settings = dataclasses.replace(encoder.settings, **given, normalize=True)
    if arguments.truncate_dim is not None:
        encoder.truncate_to(arguments.truncate_dim)
    if arguments.expert is not None:
        choose_or_refuse(encoder, arguments.expert, where=f"{name}: ")
    if encoder.device.type == "cpu":
        keep_freed_memory()
    return encoder


def choose_or_refuse(model: Encoder | nn.Module, expert: int, option: str = "expert", where: str = "") -> None:
    """Choose an expert of a model; where it has no such, :class:`OptionError` for an ``option``, which begins with ``where``."""
    from clpl_moe.moe.inject import choose_expert

    try:
        choose_expert(model, expert)
    except ValueError as error:
        raise OptionError(option, f"{where}{error}") from None
