"""A small comparison: its collection, its plan, and finished runs."""

from pathlib import Path

from clpl_moe.ablate.options import AblateArguments
from clpl_moe.ablate.plan import make_plan
from clpl_moe.common.files import write_json, write_jsonl


def make_collection(folder: Path, language: str = "ko") -> Path:
    """Passages of letters; queries are the beginnings of their passages."""
    texts = [f"{a}{b} {b}{a} {c}{a}{b}" for a in "abcd" for b in "efg" for c in "hi"]
    place = folder / language
    write_jsonl(place / "corpus.jsonl", ({"id": f"p{i}", "text": text} for i, text in enumerate(texts)))
    for split, numbers in (("train", range(0, 12)), ("dev", range(12, 24))):
        write_jsonl(place / f"{split}_queries.jsonl", ({"id": f"{split}{i}", "text": texts[i][:5]} for i in numbers))
        write_jsonl(
            place / f"{split}_qrels.jsonl", ({"qid": f"{split}{i}", "docid": f"p{i}", "relevance": 1} for i in numbers)
        )
    return folder


TRAIN = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "train_group_size": 2,
    "query_max_len": 20,
    "passage_max_len": 20,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
}


def plan(configuration, **changes):
    return make_plan(AblateArguments(**(configuration | changes)))


def keys(configuration, **changes):
    return [run.decisive.key for run in plan(configuration, **changes).runs]


def finish(run, value):
    write_json(run.folder / "options.json", run.decisive.values)
    write_json(
        run.folder / "run.json",
        {
            "language": "ko",
            "seed": run.seed,
            "key": run.decisive.key,
            "training": None,
            "dtype": "float32",
            "metrics": {"nDCG@5": value},
            "machine": {"processor": "abacus"},
        },
    )
