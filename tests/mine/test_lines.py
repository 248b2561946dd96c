from clpl_moe.encoder.settings import EmbeddingSettings
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.lines import training_lines
from clpl_moe.mine.options import SelectionArguments
from clpl_moe.mine.select import NegativeMiner
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments, open_encoder
from helpers.mining import make_collection


def test_scores_are_cosines_though_the_settings_do_not_normalize(tiny_encoder, tmp_path):
    collection = Collection.load(make_collection(tmp_path), "ko", "train")
    encoding = EncodingArguments(passage_max_len=100)
    encoder = open_encoder(str(tiny_encoder), encoding)
    encoder.settings = EmbeddingSettings(normalize=False)
    selection = SelectionArguments(negatives=3, max_positive_ratio=0)
    miner = NegativeMiner(
        index=PassageIndex(collection), selection=selection, encoding=encoding, encoder=encoder, progress=False
    )
    records = list(training_lines(miner, collection, most=4))
    scores = [s for r in records for s in r["pos_scores"] + r["neg_scores"]]
    assert len(scores) == miner.counts["negatives"] + len(records) == 24
    assert max(map(abs, scores)) <= 1.001
