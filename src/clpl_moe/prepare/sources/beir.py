"""BEIR's layout (Thakur et al. 2021, arXiv:2104.08663), which many data sets share.

- ``corpus.jsonl``: ``_id``, ``title`` (may be empty), ``text``;
- ``queries.jsonl``: ``_id``, ``text``, of all splits together;
- ``qrels/<split>.tsv``: query id, passage id, score, after a line with these names.

The JSONL files may be compressed (``.jsonl.gz``). A split takes the queries that it judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clpl_moe.common.errors import UserError, at
from clpl_moe.prepare.sources.stream import Split, read_qrels, read_texts

ID_FIELD = "_id"


def find_files(folder: Path, splits: Sequence[str] | None = None) -> tuple[Path, Path, dict[str, Path]]:
    """The corpus, the queries, and for each split its qrels; without ``splits`` all that are there.

    Raises:
        UserError: a file is missing.
    """
    if not folder.is_dir():
        raise UserError(f"{at(folder)}: no such folder, expected one in BEIR's layout")
    paths = []
    for name in ("corpus.jsonl", "queries.jsonl"):
        candidates = (folder / name, folder / f"{name}.gz")
        paths.append(next((path for path in candidates if path.is_file()), None))
        if paths[-1] is None:
            raise UserError(
                f"{at(folder / name)}: no such file; BEIR's layout is corpus.jsonl, queries.jsonl, qrels/<split>.tsv"
            )
    qrels = {path.stem: path for path in sorted((folder / "qrels").glob("*.tsv"))}
    there = f"the splits here are {', '.join(qrels)}" if qrels else "the folder holds none"
    for split in splits or ():
        if split not in qrels:
            raise UserError(f"{at(folder / 'qrels' / f'{split}.tsv')}: no such file; {there}")
    if not qrels:
        raise UserError(f"{at(folder / 'qrels')}: no <split>.tsv, expected one for each split such as test.tsv")
    return paths[0], paths[1], {split: qrels[split] for split in splits or qrels}


def read_splits(queries: Path, qrels: dict[str, Path]) -> dict[str, Split]:
    """Queries and judgements of each split.

    Raises:
        UserError: a line is broken, an id stands twice, a judgement names an unknown query.
    """
    texts: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, identifier, record in read_texts(queries, ID_FIELD):
        if identifier in lines:
            raise UserError(
                f"{at(queries, number, ID_FIELD)}: '{identifier}' stands on line {lines[identifier]} already"
            )
        if not record["text"].strip():
            raise UserError(f"{at(queries, number, 'text')}: the query is empty")
        lines[identifier], texts[identifier] = number, record["text"]
    splits = {}
    for split, path in qrels.items():
        judgements = read_qrels(path, ("query-id", "corpus-id", "score"), texts, queries, header=True)
        if not judgements:
            raise UserError(f"{at(path)}: holds no judgement")
        judged = {query_id for query_id, _ in judgements}
        splits[split] = Split({i: text for i, text in texts.items() if i in judged}, judgements)
    return splits
