"""A smaller vocabulary: the pieces that some texts use, and those that any other text needs.

1. The texts are tokenized, also with the prompts in front of them. Their pieces stay, and so do special tokens, single
   characters and bytes, so that another text falls into smaller pieces.
2. Pieces that stay keep their order. Numbers up to the padding token's do not change: XLM-R counts positions from it.
3. Rows of the word embeddings go with their pieces; nothing else changes.

A text that was read has the same pieces as before, and so the same embedding:

- Unigram (XLM-R): the best path is among fewer candidates, with the scores that it had. The least score of a piece stays in
  the vocabulary, since an unknown character has a score below it.
- WordPiece (BERT): the longest piece that fits is the one that it was. A word is unknown where no piece fits some way into it;
  the pieces up to there stay, so that it stays unknown.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import read_json, write_json
from clpl_moe.encoder import Encoder
from clpl_moe.encoder.encoder import save_tokenizer

_AT_ONCE = 4096  # texts
_NUMBERS = [f"{name}_token_id" for name in ("bos", "eos", "sep", "cls", "pad", "mask", "unk", "decoder_start")]
_OTHER_FORMS = ("sentencepiece.bpe.model", "vocab.txt")  # of a vocabulary, which tokenizer.json holds


def trim_vocabulary(encoder: Encoder, texts: Iterable[str]) -> tuple[int, int]:
    """Keep the pieces that texts use, and what other texts need; in place. Returns the numbers of pieces before and after.

    Raises:
        UserError: there is no text; the tokenizer is neither Unigram nor WordPiece, as XLM-R's and BERT's are, or does not fit
            the model.
    """
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    spec = {} if backend is None else json.loads(backend.to_str())
    kind = spec.get("model", {}).get("type")
    if kind not in ("Unigram", "WordPiece"):
        raise UserError(
            f"trim_vocab: found a tokenizer of the kind {kind}, expected Unigram (XLM-R) or WordPiece (BERT)"
        )
    prompts = dict.fromkeys(["", encoder.settings.query_prompt, encoder.settings.passage_prompt])
    used = _used(spec, (prompt + text for text in texts for prompt in prompts))
    if not used:
        raise UserError("trim_vocab: found no text, expected some whose pieces are kept")
    kept = sorted(used | _needed(spec, encoder.tokenizer))
    table = encoder.model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    if kept[-1] >= len(table.weight):
        raise UserError(
            f"trim_vocab: the tokenizer has the piece {kept[-1]}, the model has embeddings for {len(table.weight)}"
        )
    numbers = {old: new for new, old in enumerate(kept)}
    encoder.tokenizer = _reloaded(encoder.tokenizer, _renumbered(spec, numbers), numbers)
    _keep_rows(encoder.model, table, kept, numbers)
    return len(table.weight), len(kept)


def _used(spec: dict[str, Any], texts: Iterable[str]) -> set[int]:
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.no_truncation()
    backend.no_padding()
    used: set[int] = set()
    unknown = backend.token_to_id(str(spec["model"].get("unk_token", "")))  # WordPiece has one, Unigram a number
    texts = iter(texts)
    with tqdm(desc="read", unit="text", leave=False) as bar:
        while part := list(islice(texts, _AT_ONCE)):
            for text, encoding in zip(part, backend.encode_batch(part, add_special_tokens=False)):
                used.update(encoding.ids)
                if unknown is not None and unknown in encoding.ids:
                    used |= _pieces_of_unknown_words(text, backend, spec)
            bar.update(len(part))
    return used


def _pieces_of_unknown_words(text: str, backend: Any, spec: dict[str, Any]) -> set[int]:
    vocabulary, prefix = spec["model"]["vocab"], spec["model"]["continuing_subword_prefix"]
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text] if backend.pre_tokenizer is None else [w for w, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    found = set()
    for word in words:
        start = 0
        while start < len(word) <= spec["model"]["max_input_chars_per_word"]:
            candidates = ((prefix if start else "") + word[start:end] for end in range(len(word), start, -1))
            piece = next((piece for piece in candidates if piece in vocabulary), None)
            if piece is None:
                break
            found.add(vocabulary[piece])
            start += len(piece) - (len(prefix) if start else 0)
    return found


def _needed(spec: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Numbers of the pieces that stay whatever the texts are."""
    model = spec["model"]
    needed = {*range((tokenizer.pad_token_id or 0) + 1), *_special_numbers(spec)}
    if model["type"] == "WordPiece":
        prefix, numbers = model["continuing_subword_prefix"], model["vocab"]
    else:
        prefix, numbers = "", {piece: number for number, (piece, _) in enumerate(model["vocab"])}
        least = min(range(len(model["vocab"])), key=lambda number: model["vocab"][number][1])
        needed |= {
            least,
            model["unk_id"],
            *(n for piece, n in numbers.items() if re.fullmatch("<0x[0-9A-F]{2}>", piece)),
        }
    for piece, number in numbers.items():
        parts = _characters(piece, prefix)
        if len(parts) == 1 or not numbers.keys() >= set(parts):  # one that cannot fall into smaller ones stays
            needed.add(number)
    return needed


def _characters(piece: str, prefix: str) -> list[str]:
    """The pieces of one character that a piece could fall into."""
    if prefix and piece.startswith(prefix) and piece != prefix:
        return [prefix + character for character in piece.removeprefix(prefix)]
    return [*piece[:1], *(prefix + character for character in piece[1:])]


def _special_numbers(spec: dict[str, Any]) -> Iterator[int]:
    yield from (token["id"] for token in spec["added_tokens"])
    for part in _processors(spec.get("post_processor")):
        for token in (part.get("special_tokens") or {}).values():
            yield from token["ids"]
        yield from (part[name][1] for name in ("sep", "cls") if name in part)


def _processors(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if processor is not None:
        yield processor
        for part in processor.get("processors", []):
            yield from _processors(part)


def _renumbered(spec: dict[str, Any], numbers: dict[int, int]) -> dict[str, Any]:
    model = spec["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in numbers]
        model["unk_id"] = numbers[model["unk_id"]]
    else:
        model["vocab"] = {piece: numbers[n] for piece, n in model["vocab"].items() if n in numbers}
    for token in spec["added_tokens"]:
        token["id"] = numbers[token["id"]]
    for part in _processors(spec.get("post_processor")):
        for token in (part.get("special_tokens") or {}).values():
            token["ids"] = [numbers[number] for number in token["ids"]]
        for name in ("sep", "cls"):
            if name in part:
                part[name][1] = numbers[part[name][1]]
    return spec | {"truncation": None, "padding": None}  # of the last call


def _reloaded(
    tokenizer: PreTrainedTokenizerBase, spec: dict[str, Any], numbers: dict[int, int]
) -> PreTrainedTokenizerBase:
    """A tokenizer's copy with another description, as whoever loads its folder gets it."""
    before = tokenizer.get_vocab()
    with tempfile.TemporaryDirectory(prefix="clpl-moe-") as folder:
        save_tokenizer(tokenizer, folder)
        for name in _OTHER_FORMS:
            Path(folder, name).unlink(missing_ok=True)
        Path(folder, "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        path = Path(folder, "tokenizer_config.json")
        config = read_json(path, dict)
        if (decoder := config.get("added_tokens_decoder")) is not None:
            config["added_tokens_decoder"] = {str(numbers[int(old)]): token for old, token in decoder.items()}
            write_json(path, config)
        after = AutoTokenizer.from_pretrained(folder)
    if after.get_vocab() != {piece: numbers[n] for piece, n in before.items() if n in numbers}:
        raise UserError("trim_vocab: the tokenizer numbers its pieces in a way of its own, which cannot be trimmed")
    after.name_or_path = tokenizer.name_or_path
    return after


def _keep_rows(model: Any, table: nn.Embedding, kept: list[int], numbers: dict[int, int]) -> None:
    rows = nn.Parameter(table.weight.detach()[torch.tensor(kept, device=table.weight.device)].clone())
    # Numbers up to the padding token's are what they were.
    model.set_input_embeddings(nn.Embedding(len(kept), rows.shape[1], padding_idx=table.padding_idx, _weight=rows.data))
    model.config.vocab_size = len(kept)
    for name in _NUMBERS:
        if (old := getattr(model.config, name, None)) in numbers:
            setattr(model.config, name, numbers[old])
