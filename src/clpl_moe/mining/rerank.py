"""Scores of a query and a passage read together: better than cosines, and too slow for more than a window."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clpl_moe.errors import UserError
from clpl_moe.retrieval.encode import max_positions


class Reranker:
    """A cross encoder with one output, such as BAAI/bge-reranker-v2-m3, through sentence-transformers.

    Args:
        name: folder or hub name.
        max_length: longest pair in tokens; the rest is cut off.
        batch_size: pairs at once.
        trust_remote_code: whether to run code of the model's folder.

    Raises:
        UserError: there is no such model, it was not trained to score pairs, it gives several scores, or ``max_length`` is
            beyond its positions.
    """

    def __init__(
        self, name: str, *, max_length: int = 512, batch_size: int = 32, trust_remote_code: bool = False
    ) -> None:
        from sentence_transformers import CrossEncoder

        try:
            self._model = CrossEncoder(name, max_length=max_length, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever a damaged or foreign folder brings about
            raise UserError(f"--reranker {name}: cannot be loaded: {' '.join(str(error).split())}") from None
        model = self._model.model
        # The library gives an encoder a new head: its scores would be noise.
        if (kind := (model.config.architectures or [""])[0]).endswith(("Model", "ForMaskedLM")):
            raise UserError(f"--reranker {name}: found an encoder ({kind}), expected a cross encoder")
        if (limit := max_positions(model.base_model)) is not None and max_length > limit:
            raise UserError(f"--reranker_max_len: found {max_length}, {name} takes {limit} tokens at most")
        if self._model.num_labels != 1:
            raise UserError(
                f"--reranker {name}: gives {self._model.num_labels} scores a pair, expected a model that gives one"
            )
        self._batch_size = batch_size

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """A score for each (query, passage): from 0 to 1, unless the model's own configuration has another function.

        Raises:
            UserError: a score is NaN or infinite.
        """
        scores = self._model.predict(list(pairs), batch_size=self._batch_size, show_progress_bar=False).tolist()
        if not all(map(math.isfinite, scores)):
            raise UserError("the reranker gives NaN or infinite scores: its weights are broken")
        return scores
