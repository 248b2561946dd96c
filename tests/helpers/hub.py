"""Models in the cache of the hub, as a download leaves them, for tests without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import constants


def put_into_cache(monkeypatch, cache: Path, name: str, commits: dict[str, Path], **refs: str) -> None:
    """Put a model of the hub into the cache ``cache``: a folder of files for each commit; ``refs`` name commits."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / f"models--{name.replace('/', '--')}"
    for commit, folder in commits.items():
        shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for ref, commit in refs.items():
        (repository / "refs" / ref).write_text(commit)
