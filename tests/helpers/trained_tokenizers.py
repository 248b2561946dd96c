"""Tiny tokenizers of the two kinds that models have, with pieces that were learnt from some text."""

from __future__ import annotations

from transformers import BertTokenizer, PreTrainedTokenizerBase, XLMRobertaTokenizer

COVERED = [
    "서울은 대한민국의 수도이다.",
    "탑은 1889년에 완성되었다.",
    "پایتخت ایران تهران است.",
    "दिल्ली भारत की राजधानी है।",
]
OTHER = [
    "부산의 다리는 길다.",
    "the bridges of the north were longer",
    "नदियाँ लंबी हैं",
    "رودخانه‌ها",
    "completely unheard-of",
]


def train_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """An XLM-R (Unigram) or a BERT (WordPiece) tokenizer of some hundred pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    texts = [text for text in (*COVERED, *OTHER) for _ in range(5)]
    if kind == "bert":
        special = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.train_from_iterator(
            texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
        )
        return BertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=128)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    import json

    pieces = [tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=128)
