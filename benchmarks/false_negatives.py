"""How many mined negatives are false, by the limits that mining sets: a passage that holds the answer of the question.

``python benchmarks/false_negatives.py --squad korquad.json pquad.json --languages ko fa``

The files are in SQuAD's shape. Each is prepared into a collection (without titles, which would give the article away), and
its train questions are mined with every setting, on one ranking. A negative counts as false if it contains an answer of the
question, or has the text of a positive; both without regard to case, punctuation and white space. Short answers
("1889") are found in passages that do not answer the question, too: what the whole corpus gives at random is the level of chance.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from clpl_moe.common.text_key import text_key
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.options import SelectionArguments
from clpl_moe.mine.rank import MiningQuery, Ranking, rank_passages
from clpl_moe.mine.select import NegativeMiner
from clpl_moe.prepare.__main__ import main as prepare
from clpl_moe.retrieval.collection import Collection, normalize_text
from clpl_moe.retrieval.options import EncodingArguments, open_encoder
from common import benchmark_parser, pick_device, write_result

_RANK_TO = 200
_NONE: dict[str, Any] = {"rank_from": 1, "rank_to": 60, "max_positive_ratio": 0, "max_overlap": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "any passage of the corpus": {"sampling": "corpus"},
    "top, no limit": {},
    "top, from rank 2": {"rank_from": 2},
    "top, copies left out": {"max_overlap": 0.8},
    **{f"top, at most {r:.0%}": {"max_positive_ratio": r} for r in (1.0, 0.99, 0.98, 0.97, 0.95, 0.93)},
    **{
        f"top, at most {r:.0%}, to rank {_RANK_TO}": {"max_positive_ratio": r, "rank_to": _RANK_TO}
        for r in (0.98, 0.97, 0.95, 0.93)
    },
    "top, from rank 2, at most 98%": {"rank_from": 2, "max_positive_ratio": 0.98},
    "top, from rank 2, at most 95%": {"rank_from": 2, "max_positive_ratio": 0.95},
    f"top, from rank 2, at most 95%, to rank {_RANK_TO}": {
        "rank_from": 2, "max_positive_ratio": 0.95, "rank_to": _RANK_TO
    },
    **{f"top, margin {m}": {"margin": m} for m in (0.01, 0.02, 0.03, 0.05)},
    "random, no limit": {"sampling": "random"},
    "random, at most 95%": {"sampling": "random", "max_positive_ratio": 0.95},
    "by score, no limit": {"sampling": "score"},
    "by score, at most 95%": {"sampling": "score", "max_positive_ratio": 0.95},
    "mine's defaults": {"rank_from": None, "rank_to": None, "max_positive_ratio": None, "max_overlap": None},
}  # fmt: skip


def read_answers(path: Path) -> dict[str, set[str]]:
    """Normalised question -> its answers, as they are compared."""
    answers: dict[str, set[str]] = defaultdict(set)
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                found = {text_key(answer["text"]) for answer in question.get("answers") or []}
                answers[normalize_text(question["question"])] |= found - {""}
    return answers


def measure(squad: Path, language: str, work: Path, encoder, encoding, negatives: int) -> dict[str, Any]:
    """Figures of one language: about its questions, and by setting."""
    if not (work / language).exists():
        prepare(["--squad", str(squad), "--language", language, "--output", str(work), "--titles", "false"])
    collection = Collection.load(work, language, "train")
    index = PassageIndex.load(collection)
    answers = read_answers(squad)
    queries = []
    for query_id, text in zip(collection.query_ids, collection.queries):
        if relevant := index.relevant(collection.qrels.get(query_id, {})):
            queries.append(MiningQuery(query_id, text, relevant, index.answering(text)))
    ranked = work / f"{language}-ranking.pt"
    if not ranked.exists():
        ranking = rank_passages(queries, index, _RANK_TO, encoder=encoder, encoding=encoding, cache=work / "embeddings")
        torch.save(dataclasses.asdict(ranking), ranked)
    ranking = Ranking(**torch.load(ranked))
    forms = [text_key(text) for text in index.texts]

    def holds(place: int, query: MiningQuery) -> bool:
        same = any(forms[place] == forms[positive] for positive in query.positives)
        return same or any(answer in forms[place] for answer in answers[normalize_text(query.text)])

    figures = {}
    for name, options in SETTINGS.items():
        given = {key: value for key, value in (_NONE | options).items() if value is not None}
        selection = SelectionArguments(negatives=negatives, **given)
        miner = NegativeMiner(index=index, selection=selection)
        false = total = without = fewer = 0
        distance = 0.0
        for query, mined in zip(queries, miner.select(queries, ranking)):
            false += sum(holds(place, query) for place in mined.places)
            total += len(mined.places)
            without += not mined.places
            fewer += len(mined.places) < negatives
            if mined.scores is not None:
                distance += sum(min(mined.positive_scores) - score for score in mined.scores)
        figures[name] = {
            "options": given,
            "negatives": total,
            "false": false,
            "false_share": round(false / total, 5),
            "queries_without_negatives": round(without / len(queries), 5),
            "queries_with_fewer": round(fewer / len(queries), 5),
            "mean_distance_below_positive": round(distance / total, 5) if selection.sampling != "corpus" else None,
            **miner.counts,
        }
    return {
        "passages": len(index),
        "queries": len(queries),
        "positives_with_answer": round(sum(holds(q.positives[0], q) for q in queries) / len(queries), 5),
        "settings": figures,
    }


def main() -> None:
    """The command line."""
    parser = benchmark_parser(__doc__, "false_negatives.json")
    parser.add_argument("--squad", type=Path, nargs="+", required=True, help="files in SQuAD's shape")
    parser.add_argument("--languages", nargs="+", required=True, help="a name for each of them")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/false_negatives"),
        help="folder for collections, embeddings and rankings, so that other settings take seconds; empty it for other data",
    )
    parser.add_argument("--negatives", type=int, default=8)
    parser.add_argument("--query_max_len", type=int, default=64)
    parser.add_argument("--passage_max_len", type=int, default=256)
    args = parser.parse_args()
    encoding = EncodingArguments(args.query_max_len, args.passage_max_len)
    encoder = open_encoder(args.model, encoding)
    work = args.work / encoder.fingerprint()[:16]
    results = {
        language: measure(squad, language, work, encoder, encoding, args.negatives)
        for squad, language in zip(args.squad, args.languages, strict=True)
    }
    rows = []
    for name in SETTINGS:
        found = {language: result["settings"][name] for language, result in results.items()}
        shares = {f"false, {language}": f"{100 * f['false_share']:.2f}%" for language, f in found.items()}
        lost = {f"lost, {language}": f"{100 * f['queries_without_negatives']:.1f}%" for language, f in found.items()}
        rows.append({"negatives": name, **shares, **lost})
    write_result(
        args.output,
        f"Share of mined negatives ({args.negatives} a question) that hold the answer of the question, and of questions that"
        " are lost because no passage was left. At most: of the positive's score.",
        {
            "model": Path(args.model).name,
            "precision": str(encoder.dtype).removeprefix("torch."),
            "device": pick_device(args.device),
            "squad": [path.name for path in args.squad],
            "query_max_len": args.query_max_len,
            "passage_max_len": args.passage_max_len,
            "negatives": args.negatives,
        },
        rows,
        results,
    )
    for row in rows:
        print("  ".join(f"{value:<48}" if key == "negatives" else f"{value:>7}" for key, value in row.items()))


if __name__ == "__main__":
    main()
