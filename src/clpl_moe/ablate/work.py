"""What is done for each job of the plan: prepare a collection, mine negatives, train and evaluate a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from clpl_moe.ablate.identity import OPTIONS_FILE
from clpl_moe.ablate.plan import RUN_FILE, CollectionJob, MineJob, Run
from clpl_moe.ablate.workshop import Workshop, locked
from clpl_moe.common.files import write_json
from clpl_moe.common.machine import machine, versions
from clpl_moe.evaluate.tasks import METRICS_FILE, read_result
from clpl_moe.report.course import RunCourse


def prepare(job: CollectionJob) -> str:
    """Make a collection from its files."""
    counts = job.prepare.reader.write(job.directory / job.language, job.prepare.titles)
    return ", ".join(f"{counts[name]:,} {name}" for name in ("passages", "train queries", "dev queries"))


def mine(shop: Workshop, job: MineJob, slot: int) -> str:
    """Mine one kind of negatives."""
    with locked(job.folder) as lock:
        write_json(job.folder / OPTIONS_FILE, job.decisive.values)
        collection = job.collection
        places = {"collection": str(collection.directory), "language": collection.language, "output": str(job.data)}
        shop.call("mine", job.options | places, job.folder, slot, lock)
    with job.data.open(encoding="utf-8") as file:
        return f"{sum(1 for _ in file):,} lines"


def train_and_evaluate(shop: Workshop, run: Run, keep_model: bool, metric: str, slot: int) -> str:
    """Do one run, or the rest of one."""
    with locked(run.folder) as lock:
        write_json(run.folder / OPTIONS_FILE, run.decisive.values)
        model = run.folder / "model"
        if run.train is not None and not (model / "README.md").is_file():  # training writes its card last
            if model.is_dir() and not (model / "train_config.yaml").is_file():
                shutil.rmtree(model)  # killed before it began
            options = _fill(run.train, run) | {"output_dir": str(model), "resume_from_checkpoint": "true"}
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
        found = read_result(run.folder / "results" / language / METRICS_FILE)
        content = {
            "key": run.decisive.key,
            "row": run.row,
            "language": language,
            "seed": run.seed,
            "metrics": found["metrics"],
            "dtype": found["settings"]["dtype"],
            "training": _training(run, model),
            "machine": machine(),
            "versions": versions(),
        }
        write_json(run.folder / RUN_FILE, content)
        if run.train is not None:
            _tidy(model, keep_model)
    return f"{metric} {run.metric(metric):.4f}"


def _fill(options: dict[str, Any], run: Run) -> dict[str, Any]:
    """The options of training with the run's places in them."""
    places = {"{collection}": str(run.collection.directory), "{language}": run.collection.language}
    if run.mined is not None:
        places["{train_data}"] = str(run.mined.data)

    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(v) for v in value]
        if isinstance(value, str):
            for name, place in places.items():
                value = value.replace(name, place)
        return value

    return {name: fill(value) for name, value in options.items()}


def _training(run: Run, model: Path) -> dict[str, Any] | None:
    """Steps, duration and precision of a run that was trained."""
    if run.train is None or (end := RunCourse.read(model, run.row).end) is None:
        return None
    options = run.decisive.values
    precision = "bfloat16" if options["train.bf16"] else "float16" if options["train.fp16"] else "float32"
    return {"steps": end["step"], "seconds": round(end["train_runtime"], 1), "precision": precision}


def _tidy(model: Path, keep_model: bool) -> None:
    """Remove checkpoints, and the weights of a run of which only the results are wanted."""
    for path in model.glob("checkpoint-*"):
        shutil.rmtree(path)
    if not keep_model:
        for pattern in ("*.safetensors", "*.bin", "*.pt"):
            for path in model.glob(pattern):
                path.unlink()
