"""The options that commands share which encode text, and the encoder that they ask for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clpl_moe.common.errors import require_at_least
from clpl_moe.common.files import refuse_unwritable

if TYPE_CHECKING:
    from clpl_moe.encoder import Encoder


@dataclass
class EncodingArguments:
    """How texts become embeddings."""

    query_max_len: int = field(default=128, metadata={"help": "longest query in tokens; the rest is cut off"})
    passage_max_len: int = field(default=512, metadata={"help": "longest passage in tokens; the rest is cut off"})
    batch_tokens: int | None = field(
        default=None,
        metadata={"help": "tokens a batch (on a CPU each core has one); not given: 2048 on a CPU, 16384 on a GPU"},
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={"help": "precision; auto: bfloat16 where the hardware is fast at it, else float32"},
    )
    pooling: Literal["cls", "mean", "last_token"] | None = field(
        default=None, metadata={"help": "pooling, instead of what the model folder says"}
    )
    query_prompt: str | None = field(
        default=None, metadata={"help": "text in front of each query, instead of what the model folder says"}
    )
    passage_prompt: str | None = field(
        default=None,
        metadata={"help": "text in front of each passage, instead of what the model folder says"},
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder where the corpus's embeddings (2 bytes a value) stay for later calls with the same model and"
            " corpus; not given: a folder .embeddings beside the output, deleted once that is written. In both an"
            " interrupted encoding goes on where it stopped"
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that the model's own folder holds; look at it first"}
    )

    def __post_init__(self) -> None:
        # Two tokens only begin and end a text, and a tokenizer that is to cut off more cuts nothing.
        require_at_least(self, query_max_len=3, passage_max_len=3, batch_tokens=1)
        if self.cache_dir is not None:
            refuse_unwritable(Path(self.cache_dir, "embeddings"))

    def describe(self, encoder: Encoder) -> dict[str, Any]:
        """Everything but an encoder's weights and the texts that decides the embeddings."""
        return {
            **dataclasses.asdict(encoder.settings),
            "query_max_len": self.query_max_len,
            "passage_max_len": self.passage_max_len,
            "dtype": str(encoder.dtype).removeprefix("torch."),
        }


def open_encoder(name: str, arguments: EncodingArguments) -> Encoder:
    """Load an encoder by folder or hub name, on a CUDA device where there is one.

    Raises:
        UserError: there is no such encoder, or it cannot be loaded.
    """
    import torch

    from clpl_moe.common.allocator import keep_freed_memory
    from clpl_moe.encoder import Encoder

    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    encoder = Encoder.load(name, trust_remote_code=arguments.trust_remote_code, compute_dtype=dtype)
    given = {key: getattr(arguments, key) for key in ("pooling", "query_prompt", "passage_prompt")}
    given = {key: value for key, value in given.items() if value is not None}
    # Similarity is the cosine, as in training, also where the folder leaves the normalisation to its user.
    encoder.settings = dataclasses.replace(encoder.settings, **given, normalize=True)
    if encoder.device.type == "cpu":
        keep_freed_memory()
    return encoder
