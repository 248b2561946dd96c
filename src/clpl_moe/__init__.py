"""Fine-tune encoders for retrieval with a contrastive learning penalty loss (CLPL) and mixture-of-experts layers."""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _command_starts() -> bool:
    """Whether ``python -m clpl_moe...`` or ``clpl-moe`` is about to load its modules."""
    if sys.argv[:1] == ["-m"]:
        words = sys.orig_argv
        return "-m" in words and words[words.index("-m") + 1].partition(".")[0] == "clpl_moe"
    return Path(sys.argv[0] if sys.argv else "").stem == "clpl-moe"


# Until the command takes over (clpl_moe/common/errors.py), Ctrl-C ends the process without a traceback.
if _command_starts() and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Public name -> the module that defines it. Nothing is imported before it is asked for: torch and transformers take
# seconds, and `import clpl_moe` must not.
_PUBLIC = {
    "CLPLLoss": "clpl_moe.loss",
    "CLPLOutput": "clpl_moe.loss",
    "CachedSentenceTransformerCLPLLoss": "clpl_moe.loss.sentence_transformers",
    "SentenceTransformerCLPLLoss": "clpl_moe.loss.sentence_transformers",
    "MoEConfig": "clpl_moe.moe.config",
    "inject_moe": "clpl_moe.moe.inject",
    "merge_experts": "clpl_moe.moe.inject",
    "Encoder": "clpl_moe.encoder",
    "load_encoder": "clpl_moe.encoder",
    "save_encoder": "clpl_moe.encoder",
    "UserError": "clpl_moe.common.errors",
}

__all__ = [
    "CLPLLoss",
    "CLPLOutput",
    "CachedSentenceTransformerCLPLLoss",
    "Encoder",
    "MoEConfig",
    "SentenceTransformerCLPLLoss",
    "UserError",
    "__version__",
    "inject_moe",
    "load_encoder",
    "merge_experts",
    "register",
    "save_encoder",
]

if TYPE_CHECKING:
    from clpl_moe.common.errors import UserError
    from clpl_moe.encoder import Encoder, load_encoder, save_encoder
    from clpl_moe.loss import CLPLLoss, CLPLOutput
    from clpl_moe.loss.sentence_transformers import CachedSentenceTransformerCLPLLoss, SentenceTransformerCLPLLoss
    from clpl_moe.moe.config import MoEConfig
    from clpl_moe.moe.inject import inject_moe, merge_experts


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def register() -> None:
    """Let ``AutoConfig`` and ``AutoModel`` load folders with experts without ``trust_remote_code``; imports transformers.

    ``import clpl_moe`` does this where ``AutoModel`` has been imported before, and so does the first use of
    ``inject_moe`` or ``load_encoder``. Calling it again changes nothing.
    """
    from clpl_moe.moe.modeling_clpl_moe import register_classes

    register_classes()


def _auto_model_is_loaded() -> bool:
    """Whether ``AutoModel`` has been imported, and no module of transformers is in the middle of its own import."""
    if "transformers.models.auto.modeling_auto" not in sys.modules:
        return False
    loaded = [module for name, module in sys.modules.copy().items() if name.startswith("transformers.")]
    return not any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in loaded)


if _auto_model_is_loaded():
    register()
