"""Scores of a query and a passage read together: better than cosines, and too slow for more than a window."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from clpl_moe.common.errors import OptionError, UserError, one_line
from clpl_moe.common.files import atomic_open
from clpl_moe.common.options import refuse_revision_of_folder
from clpl_moe.encoder.cut import cut_texts
from clpl_moe.encoder.folder import refuse_own_code
from clpl_moe.encoder.hub import asked
from clpl_moe.encoder.load import is_nowhere, not_found, try_tokenizer
from clpl_moe.encoder.settings import max_positions
from clpl_moe.encoder.weights import model_fingerprint, no_bar_of_weights
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.rank import Candidate, MiningQuery
from clpl_moe.retrieval.collection import hash_texts


class Reranker:
    """A cross encoder with one output, such as BAAI/bge-reranker-v2-m3, through sentence-transformers.

    :class:`UserError` where the model is missing or no such one, or ``max_length`` is beyond its positions.
    """

    def __init__(
        self, name: str, max_length: int, batch_size: int, *, trust_remote_code: bool, revision: str | None = None
    ) -> None:
        import torch
        from sentence_transformers import CrossEncoder

        refuse_revision_of_folder(name, revision, "reranker_revision")
        hub = {"revision": revision}
        if is_nowhere(name, hub, "config.json"):
            raise OptionError("reranker", str(not_found(name, hub)))
        if not trust_remote_code:
            refuse_own_code(name, hub)
        try:
            with no_bar_of_weights():
                self._model = CrossEncoder(
                    name, max_length=max_length, trust_remote_code=trust_remote_code, **asked(hub, name)
                )
                try_tokenizer(self._model.tokenizer)
                model, pairs = self._model.model, [("a", "b"), ("a b", "c d")]
                with torch.inference_mode():
                    tokens = self._model.tokenizer(pairs, padding=True, return_tensors="pt").to(model.device)
                    model(**tokens)
                    if "scores" not in self._model(dict(tokens)):  # with all modules of the folder
                        raise ValueError("its modules give no scores")
        except Exception as error:  # whatever a damaged or foreign folder brings about
            raise OptionError("reranker", f"{name} cannot be loaded: {one_line(error)}") from None
        model = self._model.model
        # The library gives an encoder a new head: its scores would be noise.
        if (kind := (model.config.architectures or [""])[0]).endswith(("Model", "ForMaskedLM")):
            raise OptionError("reranker", f"{name}: found an encoder ({kind}), expected a cross encoder")
        if (limit := max_positions(model.base_model)) is not None and max_length > limit:
            raise OptionError("reranker_max_len", f"found {max_length}, {name} takes {limit} tokens at most")
        if self._model.num_labels != 1:
            fault = f"{name}: gives {self._model.num_labels} scores a pair, expected a model that gives one"
            raise OptionError("reranker", fault)
        self._batch_size, self._max_length = batch_size, max_length

    def scores(self, pairs: Sequence[tuple[str, str]], cache: Path | None = None) -> list[float]:
        """A score for each (query, passage): from 0 to 1, unless the model's own configuration has another function.

        ``cache`` is a folder where the scores of these pairs are kept, and taken from where they are there already.
        """
        file = None
        if cache is not None:
            content = hash_texts(text for pair in pairs for text in pair)[:32]
            file = cache / f"reranker-{self._fingerprint}" / f"{content}.npy"
            with contextlib.suppress(OSError, ValueError, EOFError):
                found = np.load(file)
                if found.shape == (len(pairs),):
                    return found.tolist()
        scores = self._model.predict(self._cut(pairs), batch_size=self._batch_size, show_progress_bar=False)
        if not np.isfinite(scores).all():
            raise UserError("the reranker gives NaN or infinite scores: its weights are broken")
        if file is not None:
            with atomic_open(file, "wb") as opened:
                np.save(opened, scores)
        return scores.tolist()

    def _cut(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """The pairs with very long passages cut, so that the pair's tokens stay the same: the longer text loses its last."""
        passages = list(dict.fromkeys(passage for query, passage in pairs if len(query) <= self._max_length))
        cut = dict(zip(passages, cut_texts(self._model.tokenizer, passages, 2 * self._max_length)))
        return [(query, cut.get(passage, passage)) for query, passage in pairs]

    @cached_property
    def _fingerprint(self) -> str:
        """Of all that scores depend on but the pairs."""
        model = model_fingerprint(self._model.model, self._model.tokenizer)
        return hash_texts([model, str(self._max_length)])[:32]


@dataclass
class Scored:
    """A query with its candidates, best first, and the scores of its positives."""

    query: MiningQuery
    candidates: list[Candidate]
    positive_scores: list[float]


def rescore(found: Sequence[Scored], index: PassageIndex, reranker: Reranker, cache: Path | None) -> list[Scored]:
    """Candidates and positives with the reranker's scores, candidates ordered by them."""
    pairs = []
    for one in found:
        texts = [*(index.texts[place] for place, _ in one.candidates), *one.query.positive_texts(index)]
        pairs += [(one.query.text, text) for text in texts]
    scores = iter(reranker.scores(pairs, cache))
    rescored = []
    for one in found:
        candidates = [(place, next(scores)) for place, _ in one.candidates]
        positive_scores = [next(scores) for _ in one.positive_scores]
        rescored.append(Scored(one.query, sorted(candidates, key=lambda c: -c[1]), positive_scores))
    return rescored
