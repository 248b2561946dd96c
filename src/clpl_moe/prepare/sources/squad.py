"""Files in SQuAD's shape (Rajpurkar et al. 2016, arXiv:1606.05250), whose articles are split into train and dev.

:mod:`clpl_moe.prepare.articles` says what becomes of the articles.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from clpl_moe.common.errors import OptionError, UserError, at, type_name
from clpl_moe.common.files import json_fault, refuse_lone_surrogates
from clpl_moe.common.options import option
from clpl_moe.prepare.articles import Article, Question, make_collection
from clpl_moe.prepare.source import Source, register_source
from clpl_moe.retrieval.collection import check_id


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
    except json.JSONDecodeError as error:
        raise UserError(f"{at(path, error.lineno)}: not JSON ({error.msg}), expected SQuAD's shape") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{at(path)}: not JSON ({json_fault(error)}), expected SQuAD's shape") from None
    refuse_lone_surrogates(content, raw, at(path))
    reader = _Reader(path)
    articles = []
    for of_article, article in reader.objects(reader.object(content, ""), "data", ""):
        title = reader.get(article, "title", of_article, str, "a string", default="")
        paragraphs = []
        for of_paragraph, paragraph in reader.objects(article, "paragraphs", of_article):
            context = reader.get(paragraph, "context", of_paragraph, str, "a string")
            qas = reader.objects(paragraph, "qas", of_paragraph)
            paragraphs.append((context, [reader.question(qa, of_qa) for of_qa, qa in qas]))
        articles.append(Article(title, paragraphs))
    if not articles:
        raise UserError(f"{at(path, field='data')}: holds no article")
    return articles


class _Reader:
    """Takes values out of JSON with the path of each fault."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, place: str, found: str, expected: str) -> UserError:
        where = at(self.path, field=place) if place else at(self.path)
        return UserError(f"{where}: found {found}, expected {expected}")

    def object(self, value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(place, type_name(value), "an object")
        return value

    def get(
        self,
        record: dict[str, Any],
        key: str,
        place: str,
        kind: type | tuple[type, ...],
        expected: str,
        default: Any = None,
    ) -> Any:
        place = f"{place}.{key}" if place else key
        if record.get(key) is None and default is not None:
            return default
        if key not in record:
            raise self.fail(place, "nothing", expected)
        value = record[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(place, type_name(value), expected)
        return value

    def objects(self, record: dict[str, Any], key: str, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
        place_of_list = f"{place}.{key}" if place else key
        for index, item in enumerate(self.get(record, key, place, list, "a list")):
            inner = f"{place_of_list}[{index}]"
            yield inner, self.object(item, inner)

    def question(self, record: dict[str, Any], place: str) -> Question:
        identifier = str(self.get(record, "id", place, (str, int), "a string"))
        check_id(identifier, self.path, None, f"{place}.id")
        text = self.get(record, "question", place, str, "a string")
        impossible = self.get(record, "is_impossible", place, bool, "true or false", default=False)
        # Test sets may lack the answers; an empty list says that there is none.
        answers = self.get(record, "answers", place, list, "a list", default=[None])
        return Question(at(self.path, field=place), identifier, text, impossible or not answers)
