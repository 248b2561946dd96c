"""Whether the hub can be reached: one look, where huggingface_hub would ask five times for each file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session

_SECONDS = 10.0  # that an answer may take
_MEMORY = 60.0  # seconds after which it is asked again


def asked(hub: Mapping[str, Any], path: str | Path | None = None) -> dict[str, Any]:
    """What the hub is asked with; only this disk is looked at where the hub cannot be reached. For a ``path`` that is a folder
    nobody looks whether it can."""
    if path is not None and Path(path).is_dir():
        return dict(hub)
    out_of_reach = not constants.HF_HUB_OFFLINE and _out_of_reach(constants.ENDPOINT, int(time.monotonic() / _MEMORY))
    return {**hub, "local_files_only": True} if out_of_reach else dict(hub)


@lru_cache(maxsize=1)
def _out_of_reach(endpoint: str, period: int) -> bool:
    try:
        get_session().head(endpoint, timeout=_SECONDS)  # any answer will do
    except Exception:  # of the client for HTTP, which has another name in each version of huggingface_hub
        return True
    return False
