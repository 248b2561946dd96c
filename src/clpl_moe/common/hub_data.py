"""Data sets of the Hugging Face hub, by ``datasets``: fetched into its cache, from which rows are memory-mapped."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import UserError, at, one_line


def load_rows(name: str, config: str | None = None, *, shown: str | None = None, **how: Any) -> Any:
    """What ``datasets.load_dataset`` gives; ``name`` may be a folder that is laid out as a repository of the hub.

    Raises:
        UserError: there is no such data set, configuration or split, or the hub cannot be reached.
    """
    import datasets

    if (folder := Path(name)).is_dir():
        # The cache knows a folder by its name, whatever it holds by now.
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        state = [str(folder.resolve()), *((str(p), (s := p.stat()).st_mtime_ns, s.st_size) for p in files)]
        key = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
        how["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE, f"folder-{key}"))
    with _naming(shown or name):
        return datasets.load_dataset(name, config, **how)


def config_names(name: str, revision: str | None = None) -> list[str]:
    """The configurations of a data set; raises as :func:`load_rows`."""
    import datasets

    with _naming(name):
        return datasets.get_dataset_config_names(name, revision=revision)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn the errors of the hub, its network and ``datasets`` into the user's, but those of this machine."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"{at(name)}: the data set cannot be loaded ({one_line(error)})") from None
