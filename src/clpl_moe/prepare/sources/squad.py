"""Files in SQuAD's shape (Rajpurkar et al. 2016, arXiv:1606.05250), whose articles are split into train and dev.

:mod:`clpl_moe.prepare.articles` says what becomes of the articles.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from clpl_moe.common.errors import OptionError, UserError, at, type_name
from clpl_moe.common.files import json_fault, refuse_lone_surrogates
from clpl_moe.common.options import option
from clpl_moe.prepare.articles import Article, Question, make_collection
from clpl_moe.prepare.source import Source, register_source
from clpl_moe.retrieval.collection import check_id

_EXPECTED = {str: "a string", bool: "true or false", list: "a list", dict: "an object"}


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
    """The articles of one file in SQuAD's shape.

    Raises:
        UserError: not such a file; the message has the path, as in ``data[3].paragraphs[0].context``.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{at(path)}: no such file")
    raw = path.read_bytes()
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{at(path)}: not UTF-8 text ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        place = at(path, getattr(error, "lineno", None))
        raise UserError(f"{place}: not JSON ({json_fault(error)}), expected SQuAD's shape") from None
    refuse_lone_surrogates(content, raw, at(path))
    articles = []
    for article, of_article in _objects(path, _checked(path, content, "", dict), "", "data"):
        title = _get(path, article, of_article, "title", str, default="")
        paragraphs = []
        for paragraph, of_paragraph in _objects(path, article, of_article, "paragraphs"):
            context = _get(path, paragraph, of_paragraph, "context", str)
            qas = _objects(path, paragraph, of_paragraph, "qas")
            paragraphs.append((context, [_read_question(path, qa, of_qa) for qa, of_qa in qas]))
        articles.append(Article(title, paragraphs))
    if not articles:
        raise UserError(f"{at(path, field='data')}: holds no article")
    return articles


def _read_question(path: Path, record: dict[str, Any], place: str) -> Question:
    identifier = str(_get(path, record, place, "id", str, int))
    check_id(identifier, path, None, f"{place}.id")
    text = _get(path, record, place, "question", str)
    impossible = _get(path, record, place, "is_impossible", bool, default=False)
    # Test sets may lack the answers; an empty list says that there is none.
    answers = _get(path, record, place, "answers", list, default=[None])
    return Question(at(path, field=place), identifier, text, impossible or not answers)


def _objects(path: Path, record: dict[str, Any], place: str, key: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects in a list of a record, each with its place."""
    for index, item in enumerate(_get(path, record, place, key, list)):
        inner = f"{_join(place, key)}[{index}]"
        yield _checked(path, item, inner, dict), inner


def _get(path: Path, record: dict[str, Any], place: str, key: str, *kinds: type, default: Any = None) -> Any:
    if record.get(key) is None and default is not None:
        return default
    if key not in record:
        raise _fault(path, _join(place, key), "nothing", kinds)
    return _checked(path, record[key], _join(place, key), *kinds)


def _checked(path: Path, value: Any, place: str, *kinds: type) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _fault(path, place, type_name(value), kinds)
    return value


def _fault(path: Path, place: str, found: str, kinds: Sequence[type]) -> UserError:
    return UserError(f"{at(path, field=place or None)}: found {found}, expected {_EXPECTED[kinds[0]]}")


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
