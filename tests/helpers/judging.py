"""Judging with a server that misbehaves on purpose: training files whose truth stands in the passages, and what was written."""

from __future__ import annotations

import re
from collections import Counter

from clpl_moe.common.files import read_jsonl, write_jsonl
from helpers.synthesis import json_lines


def query(number):
    return f"query {number}. 이것은 무엇인가요?"


def text(number, what=""):
    """A passage; ``what`` is such as ``answer 3.`` or ``half 3.``."""
    return f"passage {number}. 이것은 시험을 위한 글이다. {what}".strip()


def line(number, *whats, scores=None):
    """A query with a positive of score 0.8 and a negative for each of ``whats``: "yes", "partly" or "no"."""
    said = {"yes": f"answer {number}.", "partly": f"half {number}.", "no": ""}
    numbers = [100 * number + place for place in range(1, len(whats) + 1)]
    return {
        "query": query(number),
        "pos": [text(100 * number, f"answer {number}.")],
        "neg": [text(n, said[what]) for n, what in zip(numbers, whats)],
        "pos_scores": [0.8],
        "neg_scores": list(scores or [0.75] * len(whats)),
        "pos_ids": [f"p{100 * number}"],
        "neg_ids": [f"p{n}" for n in numbers],
        "neg_q": [[f"물음 {n}"] if n % 2 else None for n in numbers],
    }


def train_file(folder, lines, name="train.jsonl"):
    write_jsonl(folder / name, lines)
    return folder / name


def false_negatives(lines):
    """How many negatives answer their query, in full or in part."""
    count = 0
    for record in lines:
        number = re.search(r"query (\d+)\.", record["query"])[1]
        count += sum(f"answer {number}." in text or f"half {number}." in text for text in record["neg"])
    return count


def results(folder):
    """Lines, and the verdicts by passage id."""
    lines = [record for _, record in read_jsonl(folder / "out.jsonl")]
    return lines, {i: v["answers"] for v in json_lines(folder / "out.verdicts.jsonl") for i in v["ids"]}


def asked(server, *what):
    """How often the server was asked about each query's passage, by numbers; ``what``: and did this."""
    counts = Counter()
    for entry in server.log(*what):
        content = entry["request"]["messages"][0]["content"]
        for passage in re.findall(r"^passage (\d+)\.", content, re.MULTILINE):
            counts[entry["passage"], passage] += 1
    return counts
