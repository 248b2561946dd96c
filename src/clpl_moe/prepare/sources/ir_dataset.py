"""Data sets of ``ir_datasets`` (MacAvaney et al. 2021, arXiv:2103.02280) by their ids, such as ``miracl/ko/dev``.

The last part of an id names the split. The library fetches the files, or says where to place those that are not free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from clpl_moe.common.errors import OptionError, UserError, at, one_line
from clpl_moe.common.options import option
from clpl_moe.prepare.source import Passage, Source, Split, register_source
from clpl_moe.retrieval.collection import check_id, check_relevance


@register_source("ir_dataset")
@dataclass
class IrDataset(Source):
    """One or several splits of a data set of ``ir_datasets``, which share their passages."""

    ir_dataset: list[str] = option("ids of ir_datasets, such as miracl/ko/train miracl/ko/dev")

    def default_language(self) -> str | None:
        return self._datasets[self.ir_dataset[0]].docs_lang()

    def read_passages(self) -> Iterator[Passage]:
        name = self.ir_dataset[0]
        with _naming(name):
            for number, doc in enumerate(self._datasets[name].docs_iter(), 1):
                place = f"{name}: passage {number}"
                check_id(doc.doc_id, place, None, "doc_id")
                title = getattr(doc, "title", None) or ""
                text = getattr(doc, "text", None)
                if text is None:  # of fields that only the data set knows
                    title, text = "", doc.default_text()
                yield Passage(doc.doc_id, text, title, place)

    def read_splits(self) -> dict[str, Split]:
        splits: dict[str, Split] = {}
        for name in self.ir_dataset:
            split = name.rpartition("/")[2]
            if split in splits:
                raise OptionError("ir_dataset", f"found two ids of a split {split!r}, expected one")
            with _naming(name):
                queries = {query.query_id: query.default_text() for query in self._datasets[name].queries_iter()}
                judgements: dict[tuple[str, str], int] = {}
                for judged in self._datasets[name].qrels_iter():
                    key = judged.query_id, judged.doc_id
                    check_relevance(judged.relevance, name, None, "relevance")
                    if judged.query_id not in queries:
                        raise UserError(f"{at(name)}: judges a query '{judged.query_id}' that it does not have")
                    if judgements.setdefault(key, judged.relevance) != judged.relevance:
                        raise UserError(f"{at(name)}: judges '{key[1]}' for query '{key[0]}' twice, and otherwise")
            for identifier, text in queries.items():
                check_id(identifier, name, None, "query_id")
                if not text.strip():
                    raise UserError(f"{at(name)}: the query '{identifier}' is empty")
            splits[split] = Split(queries, judgements)
        return splits

    @cached_property
    def _datasets(self) -> dict[str, Any]:
        try:
            import ir_datasets
        except ImportError:
            raise UserError("ir_dataset needs a library: pip install ir_datasets") from None
        found: dict[str, Any] = {}
        for name in self.ir_dataset:
            with _naming(name):
                found[name] = ir_datasets.load(name)
            for kind in ("docs", "queries", "qrels"):
                if not getattr(found[name], f"has_{kind}")():
                    known = [i for i in ir_datasets.registry if i.startswith(f"{name}/")][:10]
                    hint = f"; below it are {', '.join(known)}" if known else ""
                    raise UserError(f"{at(name)}: a data set without {kind}, expected one with judged queries{hint}")
        first = found[self.ir_dataset[0]]
        for name, other in found.items():
            if other.docs_namespace() != first.docs_namespace():
                raise OptionError("ir_dataset", f"{name} has other passages than {self.ir_dataset[0]}")
        return found


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turns the library's errors, of which there are many, into one of the user's."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{at(name)}: not an id of ir_datasets ({error})") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # of this machine: a full disk, say
        fault = f"ir_datasets cannot read it ({type(error).__name__}: {one_line(error)})"
        raise UserError(f"{at(name)}: {fault}") from None
