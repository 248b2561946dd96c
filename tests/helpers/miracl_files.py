"""A little data set in MIRACL's file layout."""

import gzip
import json


def passage(number, **fields):
    return {"docid": f"{number // 3}#{number % 3}", "title": f"제목 {number // 3}", "text": f"본문 {number}", **fields}


def write_gz(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path


def write_miracl(folder, language="ko", parts=3, flat=False):
    """12 passages in ``parts`` files, 2 queries in train and 1 in dev; every judgement's passage is there."""
    base = f"miracl-v1.0-{language}"
    corpus = folder if flat else folder / f"miracl-corpus-v1.0-{language}"
    topics, qrels = (folder, folder) if flat else (folder / base / "topics", folder / base / "qrels")
    for made in (topics, qrels):
        made.mkdir(parents=True, exist_ok=True)
    for part in range(parts):
        write_gz(corpus / f"docs-{part}.jsonl.gz", map(passage, range(12)[part::parts]))
    files = {
        topics / f"topics.{base}-train.tsv": "7#0\t첫째 질문?\n8\t둘째 질문?\n",
        qrels / f"qrels.{base}-train.tsv": "7#0\tQ0\t0#1\t1\n7#0\tQ0\t0#2\t0\n8\tQ0\t3#2\t1\n",
        topics / f"topics.{base}-dev.tsv": "9\t셋째 질문?\n",
        qrels / f"qrels.{base}-dev.tsv": "9\tQ0\t0#1\t0\n9\tQ0\t2#0\t1\n",
    }
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
    return folder
