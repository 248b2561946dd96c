"""The command ``python -m clpl_moe.mine``."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clpl_moe.common.cli import parse, print_counts
from clpl_moe.common.errors import UserError, command
from clpl_moe.common.files import refuse_existing, write_jsonl
from clpl_moe.mine import MineArguments, mine
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.select import SelectionArguments
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments, open_encoder


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments, selection, encoding = parse(
        [MineArguments, SelectionArguments, EncodingArguments],
        prog="clpl_moe.mine",
        description="Mine hard negatives and the queries that they are known to answer: training data.",
        argv=argv,
    )
    from clpl_moe.retrieval.store import cache_folder, encode_passages, processes

    ranks = selection.sampling != "corpus"
    if arguments.reranker is not None and not ranks:
        raise UserError("--reranker: --sampling corpus ranks nothing; leave out one of the two")
    refuse_existing(arguments.output, arguments.overwrite)
    collection = Collection.load(arguments.collection, arguments.language, arguments.split)
    index = PassageIndex.load(collection)
    counts: Counter[str] = Counter()
    beside = Path(f"{arguments.output}.embeddings")
    with processes() as first, cache_folder(encoding, beside) as cache:
        # Only in here each process has a GPU of its own.
        encoder = open_encoder(arguments.model, encoding) if ranks else None
        if not first:  # it encodes its part, the first one does the rest
            if ranks:
                encode_passages(encoder, index.texts, encoding, cache=cache, progress=False)
            return
        reranker = None
        if arguments.reranker is not None:
            from clpl_moe.mine.rerank import Reranker

            reranker = Reranker(
                arguments.reranker,
                max_length=arguments.reranker_max_len,
                batch_size=arguments.reranker_batch_size,
                trust_remote_code=encoding.trust_remote_code,
            )
        records = mine(
            encoder, collection, index, arguments, selection, encoding, counts, reranker=reranker, cache=cache
        )
        record = next(records, None)  # before a file is opened, of which a kill while encoding would leave something
        if record is None:
            print_counts(counts)
            raise UserError(f"no query of {index.source} could be given negatives; see above")
        write_jsonl(arguments.output, itertools.chain([record], records))
    if index.unknown:
        counts["lines of positive_queries.jsonl left out: passage not in the corpus"] = index.unknown
    print_counts(counts)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
