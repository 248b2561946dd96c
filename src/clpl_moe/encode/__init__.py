"""Encode corpora ahead of ``mine`` and ``evaluate``, on as many machines as one likes.

Each call takes the next shard that no other one works on, until all are there (:mod:`clpl_moe.retrieval.store`). The
embeddings lie in ``cache_dir``, where ``mine`` and ``evaluate`` find them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import OptionError
from clpl_moe.encode.options import EncodeArguments
from clpl_moe.retrieval.options import EncodingArguments, open_encoder

__all__ = ["Encoded", "encode"]


@dataclass
class Encoded:
    """The embeddings of a language's corpus, which are all there."""

    folder: Path  # of the shards
    passages: int
    encoded: int  # passages that this process encoded; the others were there, or are other processes' work


@takes_options(EncodeArguments, EncodingArguments)
def encode(arguments: EncodeArguments, encoding: EncodingArguments) -> dict[str, Encoded]:
    """Encode the corpora of a collection into ``cache_dir``, together with all other calls that do so; returns by language.

    Raises:
        UserError: model, collection or options are wrong, or the disk has no room.
    """
    if encoding.cache_dir is None:
        raise OptionError("cache_dir", "found nothing, expected the folder of the embeddings")
    encoding.refuse_search("embeddings are written in 16 bits; mine and evaluate take the option when they search them")
    from clpl_moe.retrieval.collection import load_passages
    from clpl_moe.retrieval.store import EmbeddingShards, encode_passages, processes

    cache, found = Path(encoding.cache_dir), {}
    corpora = {name: load_passages(arguments.collection, name) for name in dict.fromkeys(arguments.languages)}
    with processes():
        encoder = open_encoder(arguments.model, encoding, arguments.revision)
        for name, passages in corpora.items():
            shards = encode_passages(encoder, passages, encoding, cache=cache)
            assert isinstance(shards, EmbeddingShards)
            found[name] = Encoded(shards.folder, len(shards), shards.encoded)
    return found
