"""Do other tools give a model folder's own embeddings? Each is run in a process of its own and compared with ``Encoder``."""

from __future__ import annotations

import filecmp
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe.check.calls import Model, Tool, describe, find_tools, flag_embedding_arguments
from clpl_moe.check.options import CheckArguments
from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import UserError, at, no_such, shorten

if TYPE_CHECKING:
    from torch import Tensor

    from clpl_moe.encoder import Encoder

__all__ = ["CheckArguments", "Checked", "ToolCheck", "check", "flag_embedding_arguments"]

# Float16 and another order of sums stay far below; a prompt that is missing is above.
_MOST = 1e-4
_QUERIES = ["한글은 언제 만들어졌나요?", "تهران کجا می‌باشد؟", "दिल्ली कहाँ है?", "When was the tower built?"]
_PASSAGES = [
    "한글은 세종대왕이 1443년에 만들었다.",
    "تهران پایتخت ایران است و می‌گویند بزرگ است.",
    "दिल्ली भारत की राजधानी है।",
    "The tower was completed in 1889 for a world's fair.",
]
_LONGEST = 700  # tokens of the text that shows what is cut off: tools that cut at 512 show, and no more is computed than needed
# Of the tools' processes: nothing is sent or fetched, code of the folder is copied afresh, and all compute on the processor.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "ANONYMIZED_TELEMETRY": "False",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class ToolCheck:
    """What one tool made of a folder.

    Attributes:
        tool: its name.
        version: of its package; None: not installed.
        usual: largest cosine distance to ours with the tool's defaults; None where these fail.
        right: the same of ``call``; None where that fails.
        call: Python code that gives our embeddings.
        fault: why there is no distance.
    """

    tool: str
    version: str | None = None
    usual: float | None = None
    right: float | None = None
    call: str = ""
    fault: str | None = None

    @property
    def is_right(self) -> bool:
        return self.right is not None and self.right <= _MOST


@dataclass
class Checked:
    """What the tools made of a folder; ``str`` is the table, and the call of each tool that is right."""

    folder: Path
    tools: list[ToolCheck]

    @property
    def wrong(self) -> list[ToolCheck]:
        """The installed tools whose call does not give our embeddings."""
        return [tool for tool in self.tools if tool.call and not tool.is_right]

    def __str__(self) -> str:
        lines = [f"{'largest cosine distance to ours':<36}{'usual call':>12}{'call below':>12}"]
        for tool in self.tools:
            name = f"{tool.tool} {tool.version or ''}".strip()
            cells = [_cell(tool.usual), _cell(tool.right)] if tool.call else [f"  {tool.fault}"]
            lines.append(f"{name:<36}" + "".join(f"{cell:>12}" for cell in cells))
            if tool.call and tool.fault:
                lines.append(f"    {tool.fault}")
        calls = [f"# {tool.tool}\n{tool.call}" for tool in self.tools if tool.is_right]
        return "\n\n".join(["\n".join(lines), *calls]).rstrip()


def _cell(distance: float | None) -> str:
    return "fails" if distance is None else f"{distance:.6f}"


@takes_options(CheckArguments)
def check(arguments: CheckArguments) -> Checked:
    """Load a model folder with each tool that is installed, and compare its embeddings with :class:`clpl_moe.Encoder`'s.

    Raises:
        UserError: there is no such folder, it cannot be loaded, is a checkpoint of 2024, or holds code that is not this package's and
            ``trust_remote_code`` is not set.
    """
    import torch

    from clpl_moe.encoder import Encoder

    folder = Path(str(arguments.folder))
    if not folder.is_dir():
        raise UserError(f"{at(folder)}: {no_such('folder', folder)} of a model")
    if not arguments.trust_remote_code:
        _refuse_foreign_code(folder)
    _refuse_2024(folder)
    encoder = Encoder.load(
        folder, compute_dtype=torch.float32, device="cpu", trust_remote_code=arguments.trust_remote_code
    )
    passages = [*_PASSAGES, _long_text(encoder)]
    ours = {
        "queries": encoder.encode_queries(_QUERIES, progress=False),
        "passages": encoder.encode_passages(passages, progress=False),
    }
    texts = {"QUERIES": _QUERIES, "PASSAGES": passages}
    model = describe(folder, encoder.settings, encoder.max_length)
    with tempfile.TemporaryDirectory() as place:
        found = [_check(tool, model, texts, ours, Path(place)) for tool in find_tools(arguments.tools)]
    return Checked(folder, found)


def _refuse_foreign_code(folder: Path) -> None:
    """Raise :class:`UserError` where a tool could run code of the folder that this package did not write."""
    from clpl_moe.encoder.folder import TRUST, refuse_own_code
    from clpl_moe.moe import config

    refuse_own_code(folder, {})
    own = Path(config.__file__).parent
    for file in sorted(folder.glob("*.py")):
        if not ((own / file.name).is_file() and filecmp.cmp(file, own / file.name, shallow=False)):
            raise UserError(
                f"{at(file)}: is not the code of this version of clpl_moe, and the tools would run it; {TRUST}"
            )


def _refuse_2024(folder: Path) -> None:
    """Raise :class:`UserError` for what tools would load as a dense model, without its experts."""
    from clpl_moe.encoder.load import is_2024_checkpoint, read_config

    if is_2024_checkpoint(read_config(folder)):
        instead = "export or merge writes a folder that they load"
        raise UserError(f"{at(folder)}: a checkpoint of 2024, whose experts no tool here reads; {instead}")


def _long_text(encoder: Encoder) -> str:
    """A text that has more tokens than the encoder takes, but no more than needed."""
    sentence = _PASSAGES[0] + " "
    tokens = len(encoder.tokenizer(sentence)["input_ids"]) - 2
    return sentence * (min(encoder.max_length, _LONGEST) // tokens + 20)


def _check(tool: Tool, model: Model, texts: dict[str, list[str]], ours: dict[str, Tensor], place: Path) -> ToolCheck:
    found = ToolCheck(tool.name)
    try:
        found.version = importlib.metadata.version(tool.package)
    except importlib.metadata.PackageNotFoundError:
        return replace(found, fault=f"not installed: pip install {tool.package}")
    if misfit := tool.fits(model):
        return replace(found, fault=misfit)
    found.call = tool.call(model)
    named = replace(model, queries="QUERIES", passages="PASSAGES")
    results = _run({"right": tool.call(named), "usual": tool.usual(named)}, texts, place)
    found.fault = results["right"].get("fault") or results["usual"].get("fault")
    found.right, found.usual = (_distance(results[name], ours) for name in ("right", "usual"))
    return found


def _run(calls: dict[str, str], texts: dict[str, list[str]], place: Path) -> dict[str, dict[str, Any]]:
    """What :mod:`clpl_moe.check.child` finds for each of the calls."""
    output = place / "found.json"
    output.unlink(missing_ok=True)
    ran = subprocess.run(
        [sys.executable, "-m", "clpl_moe.check.child", str(output)],
        input=json.dumps({"texts": texts, "calls": calls}),
        env={**os.environ, **_ENVIRONMENT, "HF_MODULES_CACHE": str(place / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    if not output.exists():
        fault = f"its process ended with exit code {ran.returncode}: {' '.join(ran.stderr[-300:].split())}"
        return {name: {"fault": fault} for name in calls}
    found = json.loads(output.read_text(encoding="utf-8"))
    for result in found.values():
        if "fault" in result:
            result["fault"] = shorten(" ".join(result["fault"].split()), 300)
    return found


def _distance(theirs: dict[str, Any], ours: dict[str, Tensor]) -> float | None:
    """The largest cosine distance of any text; None where there are no such embeddings."""
    import torch

    distances = []
    for name, expected in ours.items():
        given = torch.tensor(theirs.get(name) or [], dtype=torch.float64)
        if given.shape != expected.shape:
            return None
        distances.append(1 - torch.cosine_similarity(given, expected.double()))
    return float(torch.cat(distances).max())
