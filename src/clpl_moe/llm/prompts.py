"""Prompts in a YAML file: ``language: prompt``, with places for what is asked about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.yaml_files import load_yaml


def load_prompt(path: Path, language: str, required: Sequence[str], optional: Sequence[str] = ()) -> str:
    """The prompt for a language (of ``ko-KR`` or ``ko-no-titles`` that for ``ko``, unless it has its own), else the ``generic``
    one, of a file whose prompts are all checked.

    Each has to have the places ``required``, such as ``{passage}``, and may have those that are ``optional``.
    """
    prompts = load_yaml(path)
    places = [f"{{{name}}}" for name in (*required, *optional)]
    for name, prompt in prompts.items():
        if not isinstance(name, str):  # such as no, which YAML takes for false
            raise UserError(f"{at(path)}: found {name!r}, expected the name of a language; put it into quotes")
        place = at(path, field=name)
        if not isinstance(prompt, str):
            raise UserError(f"{place}: found a {type(prompt).__name__}, expected the prompt's text")
        for missing in (one for one in required if f"{{{one}}}" not in prompt):
            raise UserError(f"{place}: the prompt has no {{{missing}}}, the place of the {missing}")
        for found in re.findall(r"\{\w+\}", prompt):
            if found not in places:
                raise UserError(f"{place}: found {found}, expected {' or '.join(places)}")
    for name in (language, language.split("-")[0], "generic"):
        if name in prompts:
            return prompts[name]
    raise UserError(f"{at(path)}: no prompt for '{language}' and no 'generic' one; the file has {', '.join(prompts)}")


def fill_prompt(prompt: str, **values: str) -> str:
    """A prompt with its places filled; braces within the values mean nothing."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda found: values[found[0][1:-1]], prompt)
