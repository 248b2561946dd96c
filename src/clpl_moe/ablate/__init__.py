"""``python -m clpl_moe.ablate``: which part of a recipe brings what, on several languages and seeds.

1. Collections are given, or prepared from files in SQuAD's shape.
2. Negatives are mined once per language and kind.
3. Each row (a named set of options) is trained and evaluated per language and seed, every run in processes of its own.
4. A table (Markdown and JSON) and a picture: mean and spread over the seeds, and the error relative to the first row.

Each folder says all that decides what it holds (options with their defaults, the content of model and data). A
finished run is not repeated while that is the same, whatever its row is called and however the configuration is arranged; an
unfinished one goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpl_moe.common.cli import parse_values
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open, hash_file, refuse_existing, refuse_unwritable, write_json
from clpl_moe.common.machine import machine, usable_cores, versions, without_folders

# What decides nothing about a result, or is known by its content.
_PLACES = {
    "output_dir",
    "output",
    "run_name",
    "logging_dir",
    "cache_path",
    "cache_dir",
    "collection",
    "language",
    "overwrite",
}
# Paths (or hub names) among the options of training.
_SOURCES = (
    *("model_name_or_path", "tokenizer_name", "train_data"),
    *("dev_collection", "ance_collection", "ance_positive_queries"),
)
_OPTIONS = "options.json"  # all that decides what the folder holds
_DONE = "run.json"


@dataclass
class AblateArguments:
    """What to compare. Mappings are written in the ``--config`` file."""

    model: str = field(metadata={"help": "base model: folder or hub name"})
    languages: str = field(
        metadata={
            "help": "mapping: language -> `collection` (folder that holds a folder per language) or `squad` (files to"
            " prepare one from), and optionally `mine`, `train`, `evaluate`: options for this language"
        }
    )
    rows: str = field(
        metadata={
            "help": "mapping: row -> `label`, `mine` and `train` (options that differ from the shared ones; `train: false` is"
            " the base model), `seeds`; the first row is what the others are compared with"
        }
    )
    prepare: str = field(default="{}", metadata={"help": "mapping: options of clpl_moe.prepare, for `squad`"})
    mine: str = field(default="{}", metadata={"help": "mapping: options of clpl_moe.mine that all rows share"})
    train: str = field(
        default="{}",
        metadata={
            "help": "mapping: options of clpl_moe.train that all rows share; {collection}, {language} and {train_data} in a"
            " value stand for those of the run"
        },
    )
    evaluate: str = field(default="{}", metadata={"help": "mapping: options of clpl_moe.evaluate"})
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44], metadata={"help": "seeds of the training"})
    metric: str = field(default="nDCG@5", metadata={"help": "what the table shows"})
    runs: str = field(default="runs/ablation", metadata={"help": "folder of all runs; what it holds is not repeated"})
    output: str = field(
        default="runs/ablation/ablation.json",
        metadata={"help": "JSON file of the results; table (.md) and picture (.png) lie beside it"},
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "rows to run now; the table has the others as far as they are finished"}
    )
    parallel: int = field(
        default=1, metadata={"help": "runs at a time; they share the processor's cores and take one GPU each"}
    )
    keep_models: bool = field(default=False, metadata={"help": "keep every run's weights, not only its results"})
    dry_run: bool = field(default=False, metadata={"help": "say what is finished and what is not, and stop"})
    overwrite: bool = field(default=False, metadata={"help": "replace the results of another configuration"})

    def __post_init__(self) -> None:
        for name in ("languages", "rows", "prepare", "mine", "train", "evaluate"):
            setattr(self, name, _mapping(name, getattr(self, name)))
        for name in ("languages", "rows"):
            if not getattr(self, name):
                raise UserError(f"{name}: found nothing, expected at least one")
        if self.parallel < 1:
            raise UserError(f"--parallel: found {self.parallel}, expected at least 1")
        if Path(self.output).suffix != ".json":
            raise UserError(f"--output: found {self.output}, expected a name ending in .json")
        for name in self.only or ():
            if name not in self.rows:
                raise UserError(f"--only: found '{name}', expected some of {', '.join(self.rows)}")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, dict):
        raise UserError(f"{name}: found {value!r}, expected a mapping of names to values, in the --config file")
    return value


@dataclass
class Decisive:
    """All options and contents that decide a result, by name, and the defaults of those that have one."""

    values: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    def __or__(self, other: Decisive) -> Decisive:
        return Decisive(self.values | other.values, self.defaults | other.defaults)

    @property
    def key(self) -> str:
        return _digest(self.values)

    def is_of(self, folder: Path) -> bool:
        """Whether what lies in a folder was made in the same way.

        An option that did not exist then was not used then: it must have its default. A default that changed is a difference.
        """
        try:
            then = json.loads((folder / _OPTIONS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        now = json.loads(json.dumps(self.values, default=str))
        new = {name: self.values[name] for name in now.keys() - then.keys()}
        return all(name in now and now[name] == value for name, value in then.items()) and all(
            name in self.defaults and self.defaults[name] == value for name, value in new.items()
        )

    def find(self, root: Path, name: str) -> Path:
        """The folder in ``root`` that is of these, whatever it is called, or else the one to make."""
        there = [path.parent for path in sorted(root.glob(f"*/{_OPTIONS}")) if self.is_of(path.parent)]
        return there[0] if there else root / f"{name}-{self.key[:10]}"


@dataclass
class CollectionJob:
    """A language's collection: ``directory`` holds its folder; prepared from ``squad`` where that is given."""

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
    """One row, language and seed (None for the base model, which is not trained). ``train`` still has placeholders."""

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
        """What the finished run left; None before."""
        try:
            return json.loads((self.folder / _DONE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def metric(self, name: str) -> float | None:
        """A metric of the finished run, from its run file where it was not asked for then; None before."""
        result = self.result()
        if result is None:
            return None
        if name not in result["metrics"]:
            from clpl_moe.evaluate.metrics import evaluate_run, read_trec_run
            from clpl_moe.retrieval.collection import Collection

            run = read_trec_run(self.folder / "results" / self.collection.language / "run.trec")
            split = self.decisive.values["evaluate.split"]
            qrels = Collection.load(self.collection.directory, self.collection.language, split).qrels
            return evaluate_run(qrels, run, [name])[0][name]
        return result["metrics"][name]


@dataclass
class Plan:
    """All that a configuration asks for, checked. ``runs`` has one entry per row, language and seed."""

    collections: list[CollectionJob]
    minings: list[MineJob]
    runs: list[Run]
    labels: dict[str, str]


def make_plan(arguments: AblateArguments) -> Plan:
    """Read the configuration; nothing is written.

    Raises:
        UserError: an unknown or ill-typed option in any part, a missing file.
    """
    from clpl_moe.evaluate.metrics import check_metrics

    check_metrics([arguments.metric])
    root = Path(arguments.runs)
    collections = [_collection(name, spec, arguments, root) for name, spec in arguments.languages.items()]
    options = _Options(arguments.model)
    minings: dict[str, MineJob] = {}
    folders: dict[str, Path] = {}
    runs, labels = [], {}
    for row, spec in arguments.rows.items():
        _check_name(f"rows: '{row}'", row)
        spec = _section(f"rows: '{row}'", {} if spec is None else spec, {"label", "mine", "train", "seeds"})
        labels[row] = str(spec.get("label") or row)
        for collection in collections:
            place = f"rows: '{row}', language '{collection.language}'"
            per_language = arguments.languages[collection.language]
            given: dict[str, dict[str, Any]] = {}
            for part in ("mine", "train", "evaluate"):
                sources = (getattr(arguments, part), per_language.get(part) or {}, spec.get(part) or {})
                given[part] = {k: v for s in sources for k, v in _mapping(f"{place}: {part}", s).items()}
            data = Decisive({"collection": collection.key, "language": collection.language})
            evaluate, decisive = options.evaluate(f"{place}: evaluate", given["evaluate"])
            decisive |= data
            if spec.get("train") is False:
                mined, train, model, seeds = None, None, arguments.model, [None]
                decisive.values["model"] = options.contents[model]
            else:
                mine, of_mine = options.mine(f"{place}: mine", given["mine"])
                of_mine |= data
                folder = of_mine.find(root / "negatives", collection.language)
                mined = minings.setdefault(of_mine.key, MineJob(collection, mine, of_mine, folder))
                train, of_train = options.train(f"{place}: train", given["train"], collection.language)
                model, seeds = train["model_name_or_path"], _seeds(place, spec.get("seeds"), arguments.seeds)
                decisive = decisive | of_mine | of_train
            for seed in seeds:
                of_run = decisive | Decisive({"seed": seed})
                name = "-".join([row, collection.language, *([] if seed is None else [f"seed{seed}"])])
                folder = folders.setdefault(of_run.key, of_run.find(root / "runs", name))
                own = train and train | {"seed": seed}
                runs.append(Run(row, seed, model, collection, mined, own, evaluate, of_run, folder))
    return Plan(collections, list(minings.values()), runs, labels)


def _check_name(place: str, name: str) -> None:
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".", "..") or name != name.strip():
        raise UserError(f"{place}: expected a name that can be one of a folder")


def _section(place: str, value: Any, known: set[str]) -> dict[str, Any]:
    value = _mapping(place, value)
    for name in value:
        if name not in known:
            raise UserError(f"{place}: unknown entry '{name}', expected some of {', '.join(sorted(known))}")
    return value


def _seeds(place: str, own: Any, shared: list[int]) -> list[int]:
    seeds = shared if own is None else own
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise UserError(f"{place}: seeds: found {seeds!r}, expected a list of whole numbers of at least 0")
    return list(dict.fromkeys(seeds))


def _collection(language: str, spec: Any, arguments: AblateArguments, root: Path) -> CollectionJob:
    from clpl_moe.prepare.options import prepare_arguments

    place = f"languages: '{language}'"
    spec = _section(place, spec, {"collection", "squad", "prepare", "mine", "train", "evaluate"})
    if ("collection" in spec) == ("squad" in spec):
        raise UserError(f"{place}: expected either `collection`, a folder, or `squad`, files to prepare one from")
    if "collection" in spec:
        folder = Path(str(spec["collection"]), language)
        if not (folder / "corpus.jsonl").is_file():
            raise UserError(f"{at(folder / 'corpus.jsonl')}: no such file; {place}: collection is the folder above it")
        return CollectionJob(language, folder.parent, _content(folder))
    values = arguments.prepare | _mapping(f"{place}: prepare", spec.get("prepare") or {})
    values |= {"squad": spec["squad"], "language": language, "output": "."}
    (options,) = parse_values([prepare_arguments()], "clpl_moe.prepare", f"{place}: prepare", values)
    for path in options.squad:
        if not Path(path).is_file():
            raise UserError(f"{at(path)}: no such file ({place}: squad)")
    names = {name: getattr(options, name) for name in values.keys() - {"squad", "language", "output"}}
    key = _digest(names | {"squad": [_content(Path(path)) for path in options.squad]})
    options.output = str(root / "collections" / key[:10])
    return CollectionJob(language, Path(options.output), key, options)


class _Options:
    """Checks the options of the other commands, and says of each set which of them decide the result."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.contents = _Contents()
        self._defaults: dict[str, dict[str, Any]] = {}

    def mine(self, place: str, values: dict[str, Any]) -> tuple[dict[str, Any], Decisive]:
        from clpl_moe.mine.options import MineArguments, SelectionArguments
        from clpl_moe.retrieval.options import EncodingArguments

        types = [MineArguments, SelectionArguments, EncodingArguments]
        required = {"model": self.model, "collection": "-", "language": "-", "output": "-"}
        given = {**required, **values, "collection": "-", "language": "-", "output": "-"}
        decisive = self._resolve("mine", types, place, given, required)
        for name in ("model", "reranker"):
            if (model := decisive.values[f"mine.{name}"]) is not None:
                decisive.values[f"mine.{name}"] = self.contents[model]
        return given, decisive

    def evaluate(self, place: str, values: dict[str, Any]) -> tuple[dict[str, Any], Decisive]:
        from clpl_moe.evaluate import EvaluateArguments
        from clpl_moe.retrieval.options import EncodingArguments

        required = {"model": "-", "collection": "-", "languages": "-", "output": "-"}
        given = values | required
        decisive = self._resolve("evaluate", [EvaluateArguments, EncodingArguments], place, given, required)
        # Metrics are computed from the run file, which these decide.
        of_run = {"split", "top_k", *(f.name for f in dataclasses.fields(EncodingArguments))}
        keep = {name: value for name, value in decisive.values.items() if name.removeprefix("evaluate.") in of_run}
        return given, Decisive(keep, decisive.defaults)

    def train(self, place: str, values: dict[str, Any], language: str) -> tuple[dict[str, Any], Decisive]:
        from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments

        for name in ("output_dir", "resume_from_checkpoint", "dry_run", "seed"):
            if name in values:
                raise UserError(f"{place}: '{name}' is set for each run by this command (seeds: --seeds), remove it")
        for name in ("token", "hub_token"):
            if name in values:
                raise UserError(f"{place}: '{name}' would stand in the results; export HF_TOKEN=… instead")
        types = [CLPLModelArguments, CLPLDataArguments, CLPLTrainingArguments]
        required = {"model_name_or_path": self.model, "train_data": "{train_data}", "output_dir": "-"}
        given = required | values
        decisive = self._resolve("train", types, place, given, required)

        def content(value: Any) -> Any:
            if isinstance(value, list):
                return [content(v) for v in value]
            # {collection} and {train_data} stay: what they stand for is known by what it is made from.
            path = (value or "").replace("{language}", language)
            return self.contents[path] if path and Path(path).exists() else value

        for name in _SOURCES:
            decisive.values[f"train.{name}"] = content(decisive.values[f"train.{name}"])
        return given, decisive

    def _resolve(
        self, part: str, types: list[type], place: str, given: dict[str, Any], required: dict[str, Any]
    ) -> Decisive:
        from clpl_moe.train.stored_config import resolved_config

        def named(values: dict[str, Any]) -> dict[str, Any]:
            return {f"{part}.{k}": v for k, v in values.items() if k not in _PLACES}

        if part not in self._defaults:
            self._defaults[part] = named(resolved_config(*parse_values(types, f"clpl_moe.{part}", part, required)))
        resolved = resolved_config(*parse_values(types, f"clpl_moe.{part}", place, given))
        return Decisive(named(resolved), self._defaults[part])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class _Contents(dict):
    """Path -> hash of its content, or the name itself for a model of the hub."""

    def __missing__(self, name: str) -> str:
        self[name] = _content(Path(name)) if Path(name).exists() else name
        return self[name]


def _content(path: Path) -> str:
    """Hash of a file, or of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)}\0{hash_file(file)}\0".encode())
    return digest.hexdigest()


class CommandError(Exception):
    """A command of a run failed; with the last thing it said."""


class Workshop:
    """Runs jobs, several at a time, each in processes of its own; what is running ends with it."""

    def __init__(self, parallel: int) -> None:
        import torch

        self.parallel = parallel
        # Processes that wait for each other on busy cores are slower than one after the other.
        cores = int(os.environ.get("OMP_NUM_THREADS") or 0) or usable_cores()
        self.threads = max(1, cores // parallel)
        self.gpus = torch.cuda.device_count()
        self.processes: set[subprocess.Popen] = set()
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(parallel):
            self.slots.put(slot)

    def run_all(self, jobs: Sequence[Any], work: Callable[[Any, int], str], name: str) -> dict[str, str]:
        """Do all jobs; returns those that failed, with the reason. Shows a bar, and a line for each job."""
        from tqdm import tqdm

        failed: dict[str, str] = {}
        if not jobs:
            return failed

        def do(job: Any) -> str:
            slot = self.slots.get()
            try:
                return work(job, slot)
            finally:
                self.slots.put(slot)

        with tqdm(total=len(jobs), desc=name, unit="job") as bar, ThreadPoolExecutor(self.parallel) as pool:
            futures = {pool.submit(do, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    job = futures[future]
                    try:
                        bar.write(f"{job}: {future.result()}")
                    except (CommandError, UserError, OSError) as error:
                        failed[str(job)] = str(error)
                        bar.write(f"{job}: FAILED, {error}")
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.processes):
                    process.terminate()
                raise
        return failed

    def call(self, module: str, options: dict[str, Any], folder: Path, slot: int, lock: int) -> None:
        """Run ``python -m clpl_moe.<module>`` with these options; its output is appended to the folder's ``log.txt``.

        Raises:
            CommandError: it did not end well.
        """
        import yaml

        config, log = folder / f"{module}.yaml", folder / "log.txt"
        with atomic_open(config) as file:
            yaml.safe_dump(options, file, allow_unicode=True, sort_keys=False)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        if self.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.gpus)))).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
        argv = [sys.executable, "-m", f"clpl_moe.{module}", "--config", str(config)]
        with log.open("ab") as file:
            start = file.tell()
            # The child holds the folder's lock, too: should this process be killed, nobody else works there meanwhile.
            process = subprocess.Popen(argv, stdout=file, stderr=file, env=environment, pass_fds=(lock,))
        self.processes.add(process)
        try:
            code = process.wait()
        finally:
            self.processes.discard(process)
        if code:
            raise CommandError(f"{module} ended with code {code}: {_last_words(log, start)} ({log})")


def _last_words(log: Path, start: int) -> str:
    """The error, else the last line, of what stands in a log from a byte on."""
    said = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines[-20:] if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """A folder in which nobody else works, as long as the file descriptor is open in any process."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{at(folder)}: another process works in this folder; wait for it to end") from None
        yield file.fileno()


def prepare(job: CollectionJob) -> str:
    """Make a collection from its files."""
    options = job.prepare
    counts = options.reader.write(job.directory / job.language, options.titles)
    return ", ".join(f"{counts[name]:,} {name}" for name in ("passages", "train queries", "dev queries"))


def mine_job(shop: Workshop, job: MineJob, slot: int) -> str:
    """Mine one kind of negatives."""
    with _locked(job.folder) as lock:
        write_json(job.folder / _OPTIONS, job.decisive.values)
        places = {
            "collection": str(job.collection.directory),
            "language": job.collection.language,
            "output": str(job.data),
        }
        shop.call("mine", job.options | places, job.folder, slot, lock)
    with job.data.open(encoding="utf-8") as file:
        return f"{sum(1 for _ in file):,} lines"


def train_and_evaluate(shop: Workshop, run: Run, keep_model: bool, metric: str, slot: int) -> str:
    """Do one run, or the rest of one."""
    with _locked(run.folder) as lock:
        write_json(run.folder / _OPTIONS, run.decisive.values)
        model = run.folder / "model"
        if run.train is not None and not (model / "README.md").is_file():  # training writes its card last
            if model.is_dir() and not (model / "train_config.yaml").is_file():
                shutil.rmtree(model)  # killed before it began
            options = _fill(run) | {"output_dir": str(model), "resume_from_checkpoint": "true"}
            shop.call("train", options, run.folder, slot, lock)
        language = run.collection.language
        places = {
            "model": run.model if run.train is None else str(model),
            "collection": str(run.collection.directory),
            "languages": language,
            "output": str(run.folder / "results"),
            "overwrite": True,
        }
        shop.call("evaluate", run.evaluate | places, run.folder, slot, lock)
        found = json.loads((run.folder / "results" / language / "metrics.json").read_text(encoding="utf-8"))
        content = {
            "key": run.decisive.key,
            "row": run.row,
            "language": language,
            "seed": run.seed,
            "metrics": found["metrics"],
            "dtype": found["settings"]["dtype"],
            "training": _training(run),
            "machine": machine(),
            "versions": versions(),
        }
        write_json(run.folder / _DONE, content)
        if run.train is not None:
            _tidy(model, keep_model)
    return f"{metric} {run.metric(metric):.4f}"


def _fill(run: Run) -> dict[str, Any]:
    """The options of training with the run's places in them."""
    places = {
        "{collection}": str(run.collection.directory),
        "{language}": run.collection.language,
        "{train_data}": str(run.mined.data),
    }

    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(v) for v in value]
        if isinstance(value, str):
            for name, place in places.items():
                value = value.replace(name, place)
        return value

    return {name: fill(value) for name, value in run.train.items()}


def _training(run: Run) -> dict[str, Any] | None:
    """Steps and duration of a run that was trained, from its ``metrics.jsonl``, and precision."""
    from clpl_moe.train.metrics_file import read_metrics

    path = run.folder / "model" / "metrics.jsonl"
    if not path.is_file():
        return None
    last = next((record for record in reversed(read_metrics(path)) if "train_runtime" in record), None)
    options = run.decisive.values
    precision = "bfloat16" if options["train.bf16"] else "float16" if options["train.fp16"] else "float32"
    return last and {"steps": last["step"], "seconds": round(last["train_runtime"], 1), "precision": precision}


def _tidy(model: Path, keep_model: bool) -> None:
    """Remove checkpoints, and the weights of a run of which only the results are wanted."""
    for path in model.glob("checkpoint-*"):
        shutil.rmtree(path)
    if not keep_model:
        for pattern in ("*.safetensors", "*.bin", "*.pt"):
            for path in model.glob(pattern):
                path.unlink()


def summarize(plan: Plan, metric: str) -> list[dict[str, Any]]:
    """For each row: mean and spread (standard deviation over seeds, None of one) of the metric per language and of the
    languages' average, and how the error, 1 - metric, differs from the first row's (-0.1: a tenth less).

    ``average`` is over languages, seed by seed, and is None until all are there. ``error_change`` of the average compares
    average errors; ``error_change_mean`` is the mean of the languages' changes.
    """
    languages = [collection.language for collection in plan.collections]
    rows = []
    for row in plan.labels:
        values: dict[str, dict[int | None, float]] = {language: {} for language in languages}
        for run in plan.runs:
            if run.row == row and (value := run.metric(metric)) is not None:
                values[run.collection.language][run.seed] = value
        seeds = dict.fromkeys(seed for found in values.values() for seed in found)
        averages = [
            statistics.fmean(found[seed] for found in values.values())
            for seed in seeds
            if all(seed in found for found in values.values())
        ]
        rows.append(
            {
                "row": row,
                "label": plan.labels[row],
                "languages": {language: _mean_and_spread(list(found.values())) for language, found in values.items()},
                "average": _mean_and_spread(averages),
            }
        )
    first = rows[0]
    for row in rows:
        changes = [_set_change(row["languages"][language], first["languages"][language]) for language in languages]
        _set_change(row["average"], first["average"])
        row["error_change_mean"] = None if None in changes else statistics.fmean(changes)
    return rows


def _mean_and_spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values) if values else None,
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def _set_change(cell: dict[str, Any], base: dict[str, Any]) -> float | None:
    known = cell["mean"] is not None and base["mean"] is not None and base["mean"] < 1
    cell["error_change"] = (1 - cell["mean"]) / (1 - base["mean"]) - 1 if known else None
    return cell["error_change"]


def table_rows(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the table, column -> text."""

    def cell(value: dict[str, Any]) -> str:
        if value["mean"] is None:
            return "–"
        return f"{value['mean']:.4f}" + ("" if value["spread"] is None else f" ± {value['spread']:.4f}")

    def change(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:+.1f}%".replace("-", "−")

    lines = []
    for number, row in enumerate(summary):
        runs = [len(value["values"]) for value in row["languages"].values()]
        changes = [value["error_change"] for value in row["languages"].values()]
        lines.append(
            {
                "method": row["label"],
                "seeds": str(min(runs)) if min(runs) == max(runs) else f"{min(runs)}–{max(runs)}",
                **{language: cell(value) for language, value in row["languages"].items()},
                "average": cell(row["average"]),
                "error": "" if number == 0 else change(row["average"]["error_change"]),
                "error by language": "" if number == 0 else ", ".join(map(change, changes)),
            }
        )
    return lines


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def check_output(path: Path, identity: str, overwrite: bool) -> None:
    """Refuse to replace anything but the results of the same configuration.

    Raises:
        UserError: something else is in the way.
    """
    refuse_unwritable(path)
    try:
        if json.loads(path.read_text(encoding="utf-8"))["ablation"] == identity:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for place in (path, path.with_suffix(".md"), path.with_suffix(".png")):
        refuse_existing(place, overwrite)


def write_results(path: Path, plan: Plan, identity: str, arguments: AblateArguments) -> str:
    """Write JSON, Markdown and, where matplotlib is installed, the picture; returns the table."""
    summary = summarize(plan, arguments.metric)
    rows = table_rows(summary)
    results = [(run, run.result()) for run in plan.runs]
    finished = [(run, result) for run, result in results if result is not None]
    precisions = {result["dtype"] for _, result in finished}
    precisions |= {result["training"]["precision"] for _, result in finished if result["training"]}
    question = (
        f"{arguments.metric} on the dev queries: mean and standard deviation over seeds. Error: 1 − {arguments.metric},"
        f" compared with the first row; of the average, and of {', '.join(arguments.languages)}."
    )
    content = {
        "ablation": identity,
        "question": question,
        "command": shlex.join(["python", "-m", "clpl_moe.ablate", *without_folders(sys.argv[1:])]),
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "model": Path(arguments.model).name,
            "precision": " and ".join(sorted(precisions)),
            "metric": arguments.metric,
            **{name: getattr(arguments, name) for name in ("mine", "train", "evaluate", "rows")},
        },
        "rows": rows,
        "measurements": {
            "summary": summary,
            "runs": [
                {
                    "row": run.row,
                    **{k: result[k] for k in ("language", "seed", "key", "metrics", "dtype", "training")},
                    "machine": result["machine"],
                }
                for run, result in finished
            ],
            "missing": [str(run) for run, result in results if result is None],
        },
    }
    write_json(path, content)
    table = f"{question}\n\n{markdown(rows)}\n"
    with atomic_open(path.with_suffix(".md")) as file:
        file.write(table)
    from clpl_moe.ablate.picture import plot_comparison

    try:
        plot_comparison(summary, arguments.metric, path.with_suffix(".png"))
    except UserError as error:
        print(f"no picture: {error}")
    return table


def ablate(arguments: AblateArguments) -> bool:
    """Run what is missing of a comparison, and write its table.

    Returns:
        Whether all that was asked for is finished.

    Raises:
        UserError: a mistake in the configuration, other results in the way.
    """
    plan = make_plan(arguments)
    output = Path(arguments.output)
    names = ("rows", "languages", "seeds", "metric", "model", "prepare", "mine", "train", "evaluate")
    identity = _digest({name: getattr(arguments, name) for name in names})
    if not arguments.dry_run:
        check_output(output, identity, arguments.overwrite)
        refuse_unwritable(Path(arguments.runs) / "runs")
    chosen = [run for run in plan.runs if not arguments.only or run.row in arguments.only]
    todo = list({run.folder: run for run in chosen if run.result() is None}.values())
    minings = [job for job in plan.minings if not job.finished and any(run.mined is job for run in todo)]
    print(f"{len(chosen) - sum(run.result() is None for run in chosen)} of {len(chosen)} runs are finished")
    if arguments.dry_run:
        for job in [*minings, *todo]:
            print(f"to do: {job} ({job.folder})")
        print("\n" + markdown(table_rows(summarize(plan, arguments.metric))))
        return True
    shop = Workshop(arguments.parallel)
    for job in plan.collections:
        if not job.finished:
            print(f"collection {job.language}: {prepare(job)}")
    failed = shop.run_all(minings, lambda job, slot: mine_job(shop, job, slot), "negatives")
    for run in [run for run in todo if run.mined is not None and not run.mined.finished]:
        todo.remove(run)
        failed[str(run)] = "its negatives could not be mined"
    failed |= shop.run_all(
        todo,
        lambda run, slot: train_and_evaluate(shop, run, arguments.keep_models, arguments.metric, slot),
        "runs",
    )
    print("\n" + write_results(output, plan, identity, arguments))
    print(f"wrote {output}")
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    if failed:
        print("the same command goes on with what is missing", file=sys.stderr)
    return not failed
