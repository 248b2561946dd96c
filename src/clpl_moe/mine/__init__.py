"""Mine training data: for each query hard negatives, and the queries that these do answer.

1. Passages that are copies (:mod:`clpl_moe.common.text_key`) count as one; empty ones and those that the corpus
   reserves to another split (``split``) are left out (:mod:`clpl_moe.mine.index`).
2. Negatives are taken from the passages that the encoder ranks high (:mod:`clpl_moe.mine.select`), without those that
   probably answer the query (:mod:`clpl_moe.mine.filters`).
3. Each negative brings the queries that it is known to answer, by the judgements and by ``positive_queries.jsonl``
   (:mod:`clpl_moe.mine.lines`).

Embeddings of passages are kept until the output is written: an interrupted job goes on from them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.common.files import refuse_existing, refuse_input, write_jsonl
from clpl_moe.common.output import writing
from clpl_moe.mine.options import MineArguments, SelectionArguments
from clpl_moe.retrieval.options import EncodingArguments, open_encoder

__all__ = ["Mined", "mine"]


@dataclass
class Mined:
    """The JSONL file of training data, and what was taken and what was left out, by name."""

    path: Path
    counts: Counter[str]


@takes_options(MineArguments, SelectionArguments, EncodingArguments)
def mine(arguments: MineArguments, selection: SelectionArguments, encoding: EncodingArguments) -> Mined | None:
    """Mine training data from a collection and write them.

    Under ``torchrun`` all processes share the encoding and the first one writes; the others get None.

    Raises:
        UserError: model, collection or options are wrong, the output exists, or no query could be given negatives.
    """
    for name in ("reranker", "guide"):
        if getattr(arguments, name) is not None and selection.sampling == "corpus":
            raise OptionError(name, "sampling 'corpus' ranks nothing; leave out one of the two")
    if selection.sampling == "corpus":
        encoding.refuse_search("sampling corpus ranks nothing")
    if arguments.guide == arguments.model and arguments.guide_revision == arguments.revision:
        raise OptionError("guide", f"{arguments.guide} is the model itself, whose own scores margin limits")
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(writing(arguments.output))  # before what takes seconds to load
        from clpl_moe.mine.guide import Guide
        from clpl_moe.mine.index import PassageIndex
        from clpl_moe.mine.lines import training_lines
        from clpl_moe.mine.rank import share_ranking
        from clpl_moe.mine.rerank import Reranker
        from clpl_moe.mine.select import NegativeMiner
        from clpl_moe.retrieval.collection import COLLECTION_FILES, Collection
        from clpl_moe.retrieval.store import cache_folder, processes

        refuse_existing(arguments.output, arguments.overwrite)
        folder = Path(arguments.collection, arguments.language)
        refuse_input(output.path, (file for name in COLLECTION_FILES for file in folder.glob(name)))
        collection = Collection.load(arguments.collection, arguments.language, arguments.split)
        index = PassageIndex.load(collection)
        first = stack.enter_context(processes())
        cache = stack.enter_context(cache_folder(encoding, output.embeddings))
        # Only in here each process has a GPU of its own.
        encoder = (
            None if selection.sampling == "corpus" else open_encoder(arguments.model, encoding, arguments.revision)
        )
        guide = None if arguments.guide is None else Guide.load(arguments, encoding, cache)
        if not first:  # it encodes its part, the first one does the rest
            if encoder is not None:
                share_ranking(index, encoder, encoding, cache)
            if guide is not None:
                guide.share(index)
            return None
        reranker = None
        if arguments.reranker is not None:
            sizes = (arguments.reranker_max_len, arguments.reranker_batch_size)
            trusted, revision = encoding.trust_remote_code, arguments.reranker_revision
            reranker = Reranker(arguments.reranker, *sizes, trust_remote_code=trusted, revision=revision)
        miner = NegativeMiner(
            index=index,
            selection=selection,
            encoding=encoding,
            encoder=encoder,
            seed=arguments.seed,
            reranker=reranker,
            guide=guide,
            guide_margin=arguments.guide_margin,
            cache=cache,
            jointly=True,
        )
        lines = training_lines(miner, collection, arguments.max_positive_queries)
        line = next(lines, None)  # before a file is opened, of which a kill while encoding would leave something
        if line is None:
            why = "; ".join(f"{name}: {count:,}" for name, count in (+miner.counts).items())
            raise UserError(f"no query of {index.source} could be given negatives ({why})")
        write_jsonl(arguments.output, itertools.chain([line], lines))
    if index.unknown:
        miner.counts["lines of positive_queries.jsonl left out: passage not in the corpus"] = index.unknown
    return Mined(Path(arguments.output), miner.counts)
