"""FlagEmbedding's classes from which training and its data derive; the one place that imports them.

FlagEmbedding 1.4.2 imports its rerankers together with everything else, and these need a module that transformers 5.24
removed. A stand-in takes its place during this import only: nothing here uses the rerankers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from clpl_moe.common.errors import UserError

_REMOVED = "transformers.modeling_attn_mask_utils"
_NAMES_OF_IT = (
    *("AttentionMaskConverter", "_prepare_4d_attention_mask"),
    *("_prepare_4d_causal_attention_mask", "_prepare_4d_causal_attention_mask_for_sdpa"),
)


@contextlib.contextmanager
def _removed_module() -> Iterator[None]:
    if _REMOVED in sys.modules or importlib.util.find_spec(_REMOVED) is not None:
        yield
        return
    stand_in = sys.modules[_REMOVED] = ModuleType(_REMOVED)
    for name in _NAMES_OF_IT:
        setattr(stand_in, name, _unavailable(name))
    try:
        yield
    finally:
        del sys.modules[_REMOVED]


def _unavailable(name: str) -> Callable[..., None]:
    def unavailable(*args: object, **kwargs: object) -> None:
        raise ImportError(f"{_REMOVED}.{name}: this version of transformers does not have it")

    # FlagEmbedding gives one to torch.fx.wrap, and every later trace or export looks for it by its name.
    unavailable.__name__ = name
    return unavailable


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


try:
    with _removed_module():
        from FlagEmbedding.abc.finetune.embedder import (  # noqa: F401
            AbsEmbedderCollator,
            AbsEmbedderDataArguments,
            AbsEmbedderTrainDataset,
            EmbedderOutput,
        )
        from FlagEmbedding.finetune.embedder.encoder_only.m3 import (  # noqa: F401
            EncoderOnlyEmbedderM3Model,
            EncoderOnlyEmbedderM3ModelArguments,
            EncoderOnlyEmbedderM3Trainer,
            EncoderOnlyEmbedderM3TrainingArguments,
        )
except ImportError as error:
    raise UserError(
        f"training is built on FlagEmbedding, which cannot be imported: {error}. Found {_version('FlagEmbedding')} and"
        f" {_version('transformers')}; install versions that work together: pip install --upgrade clpl-moe"
    ) from error
