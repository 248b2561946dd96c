"""The plan of an ablation: collections to prepare, negatives to mine once per language and kind, runs to do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clpl_moe.ablate.identity import CommandOptions, Decisive, content_hash, digest, refuse_set
from clpl_moe.ablate.options import AblateArguments, mapping
from clpl_moe.common.cli import parse_values
from clpl_moe.common.errors import UserError, at, no_such
from clpl_moe.common.files import are_numbers, find_json, is_number, is_text, read_json
from clpl_moe.common.yaml_files import as_text
from clpl_moe.evaluate.metrics import check_metrics, evaluate_run, read_trec_run
from clpl_moe.merge.options import RECORD_FILE
from clpl_moe.prepare.options import prepare_arguments
from clpl_moe.retrieval.collection import Collection

RUN_FILE = "run.json"  # in the folder of a finished run


@dataclass
class CollectionJob:
    """A language's collection: ``directory`` holds its folder; ``prepare`` are the options to prepare it with, if any."""

    language: str
    directory: Path
    key: str
    prepare: Any = None

    @property
    def finished(self) -> bool:
        return self.prepare is None or (self.directory / self.language / "corpus.jsonl").is_file()


@dataclass
class MineJob:
    """One kind of negatives of one language."""

    collection: CollectionJob
    options: dict[str, Any]
    decisive: Decisive
    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def finished(self) -> bool:
        return self.data.is_file()

    def __str__(self) -> str:
        return f"negatives {self.folder.name}"


@dataclass
class Run:
    """One row, language and seed. ``train`` still has placeholders; of the base model, which is not trained, ``seed``,
    ``mined`` and ``train`` are None."""

    row: str
    seed: int | None
    model: str
    collection: CollectionJob
    mined: MineJob | None
    train: dict[str, Any] | None
    evaluate: dict[str, Any]
    decisive: Decisive
    folder: Path

    def __str__(self) -> str:
        return f"{self.row} {self.collection.language}" + ("" if self.seed is None else f" seed {self.seed}")

    def result(self) -> dict[str, Any] | None:
        """The result of the finished run; None before. Raises :class:`UserError` where its file is damaged."""
        path = self.folder / RUN_FILE
        if not path.exists():
            return None
        if (found := find_json(path)) is None or not _is_result(found):
            raise UserError(f"{at(path)}: not the result of a run; remove its folder, and the run is done again")
        return found

    def mixture(self) -> dict[str, Any] | None:
        """What the run chose between base model and trained one: share, and dev metrics of each candidate; None where it did
        not choose."""
        path, names = self.folder / "model" / RECORD_FILE, ("alpha", "metric", "candidates")
        if not path.exists():
            return None
        record = read_json(path, dict)
        if missing := [name for name in names if name not in record]:
            raise UserError(f"{at(path, field=missing[0])}: missing, expected what the run chose")
        return {name: record[name] for name in names}

    def metric(self, name: str) -> float | None:
        """A metric of the finished run, from its run file where it was not asked for then; None before."""
        if (result := self.result()) is None:
            return None
        if name in result["metrics"]:
            return result["metrics"][name]
        split = self.decisive.values["evaluate.split"]
        collection = Collection.load(self.collection.directory, self.collection.language, split)
        run = read_trec_run(self.folder / "results" / collection.language / "run.trec", collection)
        return evaluate_run(collection.qrels, run, [name])[0][name]


@dataclass
class Plan:
    """All that a configuration asks for, checked. ``runs`` has one entry per row, language and seed."""

    collections: list[CollectionJob]
    minings: list[MineJob]
    runs: list[Run]
    labels: dict[str, str]


def make_plan(arguments: AblateArguments) -> Plan:
    """Read the configuration; raises :class:`UserError` for an unknown or ill-typed option in any part, a missing file."""
    check_metrics([arguments.metric])
    root = Path(arguments.runs)
    languages = arguments.mappings["languages"]
    collections = [_collection(name, spec, arguments, root) for name, spec in languages.items()]
    options = CommandOptions(arguments.model, arguments.revision)
    minings: dict[str, MineJob] = {}  # by key
    folders: dict[str, Path] = {}  # of runs, by key
    runs, labels = [], {}
    for row, given in arguments.mappings["rows"].items():
        if not isinstance(row, str) or row != Path(row).name or row in ("", ".", "..") or row != row.strip():
            raise UserError(f"rows: '{row}': expected a name that can be one of a folder")
        spec = mapping(f"rows: '{row}'", {} if given is None else given, {"label", "mine", "train", "seeds"})
        labels[row] = as_text(spec.get("label") or row)
        for collection in collections:
            place = f"rows: '{row}', language '{collection.language}'"
            own: dict[str, dict[str, Any]] = {}
            # A row's options go before a language's, and these before the shared ones.
            for part in ("mine", "train", "evaluate"):
                sources = (arguments.mappings[part], languages[collection.language].get(part), spec.get(part))
                own[part] = {k: v for x in sources for k, v in mapping(f"{place}: {part}", x or {}).items()}
            data = Decisive({"collection": collection.key, "language": collection.language})
            evaluate, decisive = options.evaluate(f"{place}: evaluate", own["evaluate"])
            decisive |= data
            mined: MineJob | None = None
            train: dict[str, Any] | None = None
            model = arguments.model
            seeds: list[int] | list[None] = [None]
            if spec.get("train") is False:
                decisive.values["model"] = options.content(model)
                if arguments.revision is not None:
                    decisive.values["revision"] = arguments.revision
                    evaluate["revision"] = arguments.revision
            else:
                mine, of_mine = options.mine(f"{place}: mine", own["mine"])
                of_mine |= data
                train, of_train = options.train(f"{place}: train", own["train"], collection.language)
                if "{train_data}" in json.dumps(train):  # not where the row names files of its own
                    folder = of_mine.find(root / "negatives", collection.language)
                    mined = minings.setdefault(of_mine.key, MineJob(collection, mine, of_mine, folder))
                model, seeds = train["model_name_or_path"], _seeds(place, spec.get("seeds"), arguments.seeds)
                decisive = decisive | of_mine | of_train
            for seed in seeds:
                of_run = decisive | Decisive({"seed": seed})
                name = "-".join([row, collection.language, *([] if seed is None else [f"seed{seed}"])])
                folder = folders.setdefault(of_run.key, of_run.find(root / "runs", name))
                seeded = None if train is None else train | {"seed": seed}
                runs.append(Run(row, seed, model, collection, mined, seeded, evaluate, of_run, folder))
    return Plan(collections, list(minings.values()), runs, labels)


def _is_result(found: dict[str, Any]) -> bool:
    """Whether all is there that the table and its JSON file show of a run."""
    training = found.get("training")
    if training is not None:
        whole = isinstance(training, dict) and is_text(training.get("precision"))
        if not whole or not (training.get("peak_bytes") is None or is_number(training["peak_bytes"])):
            return False
    texts = all(is_text(found.get(name)) for name in ("key", "language", "dtype"))
    return texts and found.keys() >= {"seed", "training", "machine"} and are_numbers(found.get("metrics"))


def _seeds(place: str, own: Any, shared: list[int]) -> list[int]:
    seeds = shared if own is None else own
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise UserError(f"{place}: seeds: found {seeds!r}, expected a list of whole numbers of at least 0")
    return list(dict.fromkeys(seeds))


def _collection(language: str, spec: Any, arguments: AblateArguments, root: Path) -> CollectionJob:

    place = f"languages: '{language}'"
    spec = mapping(place, spec, {"collection", "squad", "prepare", "mine", "train", "evaluate"})
    if ("collection" in spec) == ("squad" in spec):
        raise UserError(f"{place}: expected either `collection`, a folder, or `squad`, files to prepare one from")
    if "collection" in spec:
        folder = Path(as_text(spec["collection"]), language)
        if not (folder / "corpus.jsonl").is_file():
            raise UserError(f"{at(folder / 'corpus.jsonl')}: no such file; {place}: collection is the folder above it")
        return CollectionJob(language, folder.parent, content_hash(folder))
    values = arguments.mappings["prepare"] | mapping(f"{place}: prepare", spec.get("prepare") or {})
    refuse_set(f"{place}: prepare", values, "squad", "language", "output")
    values |= {"squad": spec["squad"], "language": language, "output": "."}
    (options,) = parse_values([prepare_arguments()], "clpl_moe.prepare", f"{place}: prepare", values)
    for path in options.squad:
        if not Path(path).is_file():
            raise UserError(f"{at(path)}: {no_such('file', path)} ({place}: squad)")
    names = {name: getattr(options, name) for name in values.keys() - {"squad", "language", "output"}}
    key = digest(names | {"squad": [content_hash(Path(path)) for path in options.squad]})
    options.output = str(root / "collections" / key[:10])
    return CollectionJob(language, Path(options.output), key, options)
