"""Articles whose paragraphs have questions as a retrieval collection.

1. Equal contexts (Unicode NFC, white space folded) become one passage.
2. Articles that share a title or a context form a group. Whole groups go to train or to dev, so that no
   passage has questions on both sides. The order of the groups is a hash of the seed and of their content: it
   depends neither on the order of the files nor on the version of Python.
3. Questions that are impossible or empty are skipped. A question that comes again on the same side becomes
   one query with all its passages. A train question that equals a dev question is left out.
4. The corpus holds every passage, also those without a question, and the side of its article as ``split``: mining
   for training takes no dev passage, which as a negative without a question would only ever be pushed away.
   ``positive_queries.jsonl`` says which train queries each passage answers, for the penalty of the loss. Dev
   questions are not in it, since training uses it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_jsonl
from clpl_moe.common.output import atomic_dir
from clpl_moe.prepare.source import Split
from clpl_moe.retrieval.collection import normalize_text


@dataclass
class Question:
    """One question of a paragraph; ``place`` says where it stands, for messages."""

    place: str
    id: str
    text: str
    impossible: bool


@dataclass
class Article:
    """One article: its title (may be empty) and, for each paragraph, the context and its questions."""

    title: str
    paragraphs: list[tuple[str, list[Question]]]


@dataclass
class ArticleCollection:
    """The lines of the corpus, the splits, the known queries of each passage, and what became of the data."""

    corpus: list[dict[str, Any]]
    splits: dict[str, Split]
    positive_queries: dict[str, list[str]]
    counts: Counter[str]

    def write(self, folder: Path) -> None:
        """Write the collection's folder, whole or not at all; a side without queries gets no files."""
        with atomic_dir(folder) as temporary:
            write_jsonl(temporary / "corpus.jsonl", self.corpus)
            for name, split in self.splits.items():
                if split.queries:
                    split.write(temporary, name)
            if self.positive_queries:
                lines = ({"docid": docid, "queries": texts} for docid, texts in self.positive_queries.items())
                write_jsonl(temporary / "positive_queries.jsonl", lines)


def make_collection(
    articles: Sequence[Article], dev_share: float = 0.2, seed: int = 42, with_titles: bool = True
) -> ArticleCollection:
    """Merge, split and name what was read; see the module for how. :class:`UserError` where a side that ``dev_share`` asks
    for is left empty, or two different questions share an id."""
    counts: Counter[str] = Counter(articles=len(articles))
    titles = [normalize_text(article.title.replace("_", " ")) for article in articles]
    corpus, asked = _merge_contexts(articles, titles if with_titles else [""] * len(articles), counts)
    if not asked:
        raise UserError("no question is left: all are impossible or empty")
    is_dev = _choose_dev(_group(articles, titles), articles, titles, dev_share, seed)
    for line in corpus:
        line["split"] = "dev" if is_dev[int(line["id"].partition("#")[0])] else "train"
    splits = _merge_questions(asked, is_dev, counts)
    for name, share in (("train", 1 - dev_share), ("dev", dev_share)):
        if share > 0 and not splits[name].queries:
            raise UserError(f"no question is left for {name}: set another dev_share ({dev_share}) or seed")
        counts[f"{name} queries"] = len(splits[name].queries)
    positive: dict[str, list[str]] = {}
    for query_id, passage_id in splits["train"].judgements:
        positive.setdefault(passage_id, []).append(splits["train"].queries[query_id])
    counts["passages"] = len(corpus)
    counts["passages with train queries"] = len(positive)
    counts["passages with dev queries"] = len({passage_id for _, passage_id in splits["dev"].judgements})
    counts["dev articles"] = sum(is_dev)
    counts["train articles"] = len(articles) - sum(is_dev)
    return ArticleCollection(corpus, splits, positive, counts)


_Asked = tuple[int, str, Question]  # number of the article, passage id, question


def _merge_contexts(
    articles: Sequence[Article], titles: Sequence[str], counts: Counter[str]
) -> tuple[list[dict[str, Any]], list[_Asked]]:
    """The lines of the corpus, still without ``split``, and the questions that can be asked."""
    corpus: dict[str, dict[str, Any]] = {}  # normalised context -> its line
    asked: list[_Asked] = []
    for number, article in enumerate(articles):
        for index, (context, questions) in enumerate(article.paragraphs):
            counts["paragraphs"] += 1
            counts["questions"] += len(questions)
            text = normalize_text(context)
            if not text:
                counts["empty contexts skipped"] += 1
                counts["questions on empty contexts skipped"] += len(questions)
                continue
            if text in corpus:
                counts["equal contexts merged"] += 1
            else:
                corpus[text] = {"id": f"{number}#{index}", "title": titles[number], "text": context.strip()}
            for question in questions:
                if question.impossible:
                    counts["impossible questions skipped"] += 1
                elif not question.text.strip():
                    counts["empty questions skipped"] += 1
                else:
                    asked.append((number, corpus[text]["id"], question))
    return list(corpus.values()), asked


def _merge_questions(asked: Sequence[_Asked], is_dev: Sequence[bool], counts: Counter[str]) -> dict[str, Split]:
    splits = {"train": Split({}, {}), "dev": Split({}, {})}
    ids: dict[tuple[str, str], str] = {}  # split and normalised text -> id of the query
    relevant: dict[tuple[str, str], dict[str, int]] = {}  # split and id of the query -> passage id -> 1
    owners: dict[str, str] = {}  # question id -> its normalised text
    dev_texts = {normalize_text(question.text) for number, _, question in asked if is_dev[number]}
    for number, passage_id, question in asked:
        split = "dev" if is_dev[number] else "train"
        text = normalize_text(question.text)
        if (owner := owners.setdefault(question.id, text)) != text:
            fault = f"the id '{question.id}' belongs to another question already: '{owner}'"
            raise UserError(f"{question.place}: {fault}")
        if split == "train" and text in dev_texts:
            counts["train questions that equal a dev question left out"] += 1
            continue
        if (split, text) in ids:
            counts["equal questions merged"] += 1
        else:
            ids[split, text] = question.id
            splits[split].queries[question.id] = question.text.strip()
        relevant.setdefault((split, ids[split, text]), {})[passage_id] = 1
    for (split, query_id), passages in relevant.items():
        splits[split].judgements |= {(query_id, passage_id): 1 for passage_id in passages}
    return splits


def _group(articles: Sequence[Article], titles: Sequence[str]) -> list[list[int]]:
    """Numbers of the articles that share titles or contexts, group by group."""
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    holder: dict[tuple[str, str], int] = {}  # a title or a context -> the first article that has it
    pairs = []
    for number, article in enumerate(articles):
        contexts = (("context", normalize_text(context)) for context, _ in article.paragraphs)
        keys = (("title", titles[number]), *contexts)
        pairs += [(number, holder.setdefault(key, number)) for key in keys if key[1]]
    graph = coo_array((np.ones(len(pairs)), tuple(zip(*pairs))), shape=(len(articles),) * 2)
    labels = connected_components(graph, directed=False)[1]
    ends = np.cumsum(np.bincount(labels))[:-1]
    return [group.tolist() for group in np.split(np.argsort(labels, kind="stable"), ends)]


def _choose_dev(
    groups: Sequence[list[int]], articles: Sequence[Article], titles: Sequence[str], share: float, seed: int
) -> list[bool]:
    """For each article, whether its questions are for dev."""

    def order(numbers: list[int]) -> bytes:
        texts = {n: normalize_text(" ".join(context for context, _ in articles[n].paragraphs)) for n in numbers}
        names = sorted(f"{titles[n]}\n{text}" for n, text in texts.items())
        return hashlib.sha256("\n".join([str(seed), *names]).encode("utf-8", "surrogatepass")).digest()

    shuffled = sorted(groups, key=order)
    if 0 < share < 1 and len(shuffled) < 2:
        raise UserError(
            "there is only one article (or all share titles or contexts), it cannot be split into train and"
            " dev: set dev_share to 0 for train only or to 1 for dev only"
        )
    wanted = round(share * len(articles))
    if 0 < share < 1:
        wanted = min(max(wanted, 1), len(articles) - 1)
    chosen: list[int] = []
    for numbers in shuffled:
        if len(numbers) <= wanted - len(chosen):
            chosen += numbers
    if wanted and not chosen:  # every group is larger than what was asked for
        chosen = min(shuffled, key=len)
    dev = set(chosen)
    return [number in dev for number in range(len(articles))]
