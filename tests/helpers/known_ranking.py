"""Mining with a ranking that is known, instead of an encoder."""

from collections import Counter

import torch

from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.options import SelectionArguments
from clpl_moe.mine.rank import MiningQuery, Ranking
from clpl_moe.mine.select import NegativeMiner
from clpl_moe.retrieval.collection import Collection
from helpers.mining import make_collection

SCORES = [0.9, 0.89, 0.88, 0.86, 0.85, 0.84, 0.8, 0.7, 0.6, 0.5]
TEXTS = [
    " ".join([word] * 6)
    for word in ("alpha", "gamma", "kilo", "mike", "oscar", "romeo", "tango", "victor", "xray", "zulu")
]
PLAIN = {"rank_from": 1, "rank_to": 10, "negatives": 10, "max_positive_ratio": 0, "max_overlap": 1}


def make_index(folder):
    passages = {f"p{i}": text for i, text in enumerate(TEXTS)}
    return PassageIndex(Collection.load(make_collection(folder, passages=passages), "ko", "train"))


def found(
    index,
    *,
    positives=(2,),
    excluded=(),
    keys=("q",),
    seed=0,
    reranker=None,
    guide=None,
    guide_margin=0.0,
    counts=None,
    **options,
):
    """The negatives of each query, by passages' :data:`SCORES`."""
    queries = [MiningQuery(key, "?", list(positives), {*positives, *excluded}) for key in keys]
    selection = SelectionArguments(**PLAIN | options)
    ranking = None
    if selection.sampling != "corpus":
        places = torch.arange(10).repeat(len(queries), 1)
        positive_scores = [[SCORES[p] for p in q.positives] for q in queries]
        ranking = Ranking(torch.tensor(SCORES)[places], places, positive_scores)
    counts = Counter() if counts is None else counts
    judges = {"reranker": reranker, "guide": guide, "guide_margin": guide_margin}
    miner = NegativeMiner(index=index, selection=selection, seed=seed, counts=counts, **judges)
    return list(miner.select(queries, ranking))
