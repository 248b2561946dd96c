"""Hook of mkdocs: pages of ``docs/`` link to other files of the repository by relative paths, as they stand on disk.

On the site a link to a picture outside of ``docs/`` becomes one to a copy of it, and a link to any other file outside becomes
its address in the public repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_PICTURES = ("imgs", "benchmarks/results")


def on_files(files, config):
    """Add the pictures outside of ``docs/``."""
    root = Path(config.config_file_path).parent
    for folder in _PICTURES:
        for path in sorted((root / folder).glob("*.png")):
            files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace the links that leave ``docs/``."""
    here = posixpath.dirname(page.file.src_uri)
    root = Path(config.config_file_path).parent

    def replace(match: re.Match) -> str:
        start, target, anchor, end = match.groups()
        path = posixpath.normpath(posixpath.join("docs", here, target))
        if "://" in target or path.startswith("docs/") or not (root / path).exists():
            return match.group()
        if path.endswith(".png"):
            return f"{start}{posixpath.relpath(path, here or '.')}{end}"
        kind = "tree" if (root / path).is_dir() else "blob"
        return f"{start}{config.repo_url.rstrip('/')}/{kind}/main/{path}{anchor or ''}{end}"

    return re.sub(_LINK, replace, markdown)
