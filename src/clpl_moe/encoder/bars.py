"""Bars of a dependency that say nothing to the user."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def no_bar_of_weights() -> Iterator[None]:
    """Load or save without transformers' bar, which lasts a moment; bars of downloads stay."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    downloads = not are_progress_bars_disabled()
    with warnings.catch_warnings():  # where the environment decides on bars of downloads
        warnings.simplefilter("ignore")
        transformers_logging.disable_progress_bar()
        if downloads:
            enable_progress_bars()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers_logging.enable_progress_bar()
            if not downloads:
                disable_progress_bars()
