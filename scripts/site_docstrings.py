"""Extension of griffe: the package's docstrings and signatures as the pages of the API show them.

Roles such as ``:class:`~clpl_moe.loss.CLPLLoss` `` become plain names, and tables of reStructuredText stay as they look. A function
of options has the signature of its Python form.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(class|func|meth|mod|data|attr|exc):`~?([\w.]+)`")
_TABLE = re.compile(r"^( *)=+ +=[= ]*\n(?:.+\n)+", re.MULTILINE)


def _named(match: re.Match) -> str:
    kind, name = match.groups()
    return f"`{name if kind == 'mod' else name.rpartition('.')[2]}`"


class PackageDocstrings(griffe.Extension):
    """Rewrites docstrings as they are read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace what Markdown would show as it stands."""
        if obj.docstring is None:
            return
        text = _ROLE.sub(_named, obj.docstring.value)
        text = _TABLE.sub(lambda match: f"{match[1]}```text\n{match[0]}{match[1]}```\n", text)
        obj.docstring.value = re.sub(r"^ *::\n\n", "", text, flags=re.MULTILINE)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """A function that takes options is called with them as keyword arguments."""
        if any("takes_options" in str(decorator.value) for decorator in func.decorators):
            keyword, rest = griffe.ParameterKind.keyword_only, griffe.ParameterKind.var_keyword
            func.parameters = griffe.Parameters(
                griffe.Parameter("config", annotation="str | None", kind=keyword, default="None"),
                griffe.Parameter("options", kind=rest),
            )
