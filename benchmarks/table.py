"""A Markdown table of each result in ``benchmarks/results/``, for docs/results.md and docs/speed.md.

``python benchmarks/table.py [benchmarks/results/training.json …]``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS


def table(result: dict[str, Any], name: str) -> str:
    """One result file as caption, table, and a line that says how it was measured."""
    columns = list(result["rows"][0])
    numeric = [all(isinstance(row[column], (int, float)) for row in result["rows"]) for column in columns]
    machine, settings = result["machine"], result["settings"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores, {machine['instructions']}"
    lines = [
        result["question"],
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("--:" if right else "---" for right in numeric) + "|",
        *("| " + " | ".join(str(row[column]) for column in columns) + " |" for row in result["rows"]),
        "",
        f"{where}; {settings['precision']}, {settings['model']}; torch {machine['torch']}. `{result['command']}`"
        f" ([figures](../benchmarks/results/{name}))",
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", default=sorted(RESULTS.glob("*.json")))
    for path in parser.parse_args().results:
        result = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in result:  # others are of scripts/collect_results.py
            print(table(result, path.name) + "\n")


if __name__ == "__main__":
    main()
