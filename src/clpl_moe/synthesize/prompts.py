"""The prompt of a language: from the package's own file, or from the user's."""

from __future__ import annotations

import re
from pathlib import Path

from clpl_moe.common.cli import load_yaml
from clpl_moe.common.errors import UserError, at

PROMPTS = Path(__file__).with_name("prompts.yaml")
_PLACEHOLDERS = ("passage", "queries")


def load_prompt(language: str, path: str | Path | None = None) -> str:
    """The prompt for a language, else the ``generic`` one, of a YAML file whose prompts are all checked; None: of the
    package's own."""
    path = PROMPTS if path is None else Path(path)
    prompts = load_yaml(path)
    for name, prompt in prompts.items():
        place = at(path, field=name)
        if not isinstance(prompt, str):
            raise UserError(f"{place}: found a {type(prompt).__name__}, expected the prompt's text")
        if "{passage}" not in prompt:
            raise UserError(f"{place}: the prompt has no {{passage}}, the place of the passage")
        for placeholder in re.findall(r"\{(\w+)\}", prompt):
            if placeholder not in _PLACEHOLDERS:
                raise UserError(f"{place}: found {{{placeholder}}}, expected {{passage}} or {{queries}}")
    for name in (language, "generic"):
        if name in prompts:
            return prompts[name]
    raise UserError(f"{at(path)}: no prompt for '{language}' and no 'generic' one; the file has {', '.join(prompts)}")


def fill(prompt: str, passage: str, queries: int) -> str:
    """A prompt with a passage put into it; braces of the passage mean nothing."""
    return prompt.replace("{queries}", str(queries)).replace("{passage}", passage)
