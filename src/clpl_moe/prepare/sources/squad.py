"""Files in SQuAD's shape (Rajpurkar et al. 2016, arXiv:1606.05250), whose articles are split into train and dev.

:mod:`clpl_moe.prepare.articles` says what becomes of the articles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from clpl_moe.common.compressed import refuse_pointer, refuse_utf16
from clpl_moe.common.errors import OptionError, UserError, at, no_such, type_name
from clpl_moe.common.files import LONE_SURROGATE, has_lone_surrogates, json_fault, parse_json
from clpl_moe.common.options import option
from clpl_moe.prepare.articles import Article, Question, make_collection
from clpl_moe.prepare.source import Source, register_source
from clpl_moe.retrieval.collection import check_id

_EXPECTED = {str: "a string", bool: "true or false", list: "a list", dict: "an object"}
_NOTHING = object()


@register_source("squad")
@dataclass
class Squad(Source):
    """JSON files in SQuAD's shape."""

    note: ClassVar[str] = "; dev questions are in none of the files that training reads"

    squad: list[str] = option("JSON files in SQuAD's shape")
    dev_share: float = option("share of the articles whose questions are for dev", 0.2)
    seed: int = option("decides which articles are for dev", 42)

    def __post_init__(self) -> None:
        if not 0 <= self.dev_share <= 1:
            raise OptionError("dev_share", f"found {self.dev_share}, expected a share from 0 to 1")

    def files(self) -> list[str]:
        return self.squad

    def write(self, folder: Path, titles: bool) -> Counter[str]:
        articles = [article for path in self.squad for article in read_squad(path)]
        collection = make_collection(articles, self.dev_share, self.seed, titles)
        collection.write(folder)
        return collection.counts


def read_squad(path: str | Path) -> list[Article]:
    """The articles of one file; :class:`UserError` with the place of a fault, as in ``data[3].paragraphs[0].context``."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{at(path)}: {no_such('file', path)}")
    raw = path.read_bytes()
    refuse_pointer(path, raw)
    refuse_utf16(path, raw)
    try:
        content = parse_json(raw)
    except UnicodeDecodeError as error:
        raise UserError(f"{at(path)}: not UTF-8 text ({error.reason})") from None
    except ValueError as error:
        place = at(path, getattr(error, "lineno", None))
        raise UserError(f"{place}: not JSON ({json_fault(error)}), expected SQuAD's shape") from None
    if has_lone_surrogates(content, raw):
        raise UserError(f"{at(path)}: {LONE_SURROGATE}")
    articles = []
    for article in _Object(path, "", content).objects("data"):
        paragraphs = []
        for paragraph in article.objects("paragraphs"):
            questions = [_read_question(qa) for qa in paragraph.objects("qas")]
            paragraphs.append((paragraph.get("context", str), questions))
        articles.append(Article(article.get("title", str, default=""), paragraphs))
    if not articles:
        raise UserError(f"{at(path, field='data')}: holds no article")
    return articles


def _read_question(qa: _Object) -> Question:
    identifier = str(qa.get("id", str, int))
    check_id(identifier, qa.path, None, f"{qa.place}.id")
    impossible = qa.get("is_impossible", bool, default=False)
    # Test sets may lack the answers; an empty list says that there is none.
    answers = qa.get("answers", list, default=[None])
    place = at(qa.path, field=qa.place)
    return Question(place, identifier, qa.get("question", str), impossible or not answers)


class _Object:
    """An object at a place of the file."""

    def __init__(self, path: Path, place: str, value: Any) -> None:
        self.path, self.place = path, place
        self.values = self._checked(value, place, dict)

    def get(self, key: str, *kinds: type, default: Any = None) -> Any:
        if self.values.get(key) is None and default is not None:
            return default
        return self._checked(self.values.get(key, _NOTHING), f"{self.place}.{key}".lstrip("."), *kinds)

    def objects(self, key: str) -> Iterator[_Object]:
        for index, value in enumerate(self.get(key, list)):
            yield _Object(self.path, f"{self.place}.{key}[{index}]".lstrip("."), value)

    def _checked(self, value: Any, place: str, *kinds: type) -> Any:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            found = "nothing" if value is _NOTHING else type_name(value)
            raise UserError(f"{at(self.path, field=place or None)}: found {found}, expected {_EXPECTED[kinds[0]]}")
        return value
