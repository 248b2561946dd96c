"""Does the jobs of the plan, several at a time: prepare a collection, mine negatives, train and evaluate a run.

Mining, training and evaluation are commands in processes of their own, forked from one that has the modules loaded.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from clpl_moe.ablate.identity import OPTIONS_FILE
from clpl_moe.ablate.plan import RUN_FILE, CollectionJob, MineJob, Run
from clpl_moe.ablate.server import Process, Server, ServerEnded
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_json
from clpl_moe.common.machine import machine, usable_cores, versions
from clpl_moe.common.output import WORK_FOLDER, writing
from clpl_moe.common.yaml_files import write_yaml
from clpl_moe.evaluate.tasks import METRICS_FILE, read_result
from clpl_moe.report.course import RunCourse

Job = TypeVar("Job")


class CommandError(Exception):
    """A command of a run failed; with the last thing it said."""


class Workshop:
    """Runs jobs, ``parallel`` of them at a time; processes that are under way end with it."""

    def __init__(self, parallel: int) -> None:
        self.parallel = parallel
        # Processes that wait for each other on busy cores are slower than one after the other.
        cores = int(os.environ.get("OMP_NUM_THREADS") or 0) or usable_cores()
        self.threads = max(1, cores // parallel)
        self.gpus = torch.cuda.device_count()
        self.processes: set[Process] = set()
        self.slots = deque(range(parallel))  # of each process that is under way one is taken
        self._server: Server | None = None
        self._starting = threading.Lock()

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def run_all(self, jobs: Sequence[Job], work: Callable[[Job], str], name: str) -> dict[str, str]:
        """Do all jobs; returns those that failed, with the reason. Shows a bar, and a line for each job, on stderr."""

        failed: dict[str, str] = {}
        if not jobs:
            return failed
        with tqdm(total=len(jobs), desc=name, unit="job") as bar, ThreadPoolExecutor(self.parallel) as pool:
            futures = {pool.submit(work, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    job = futures[future]
                    try:
                        bar.write(f"{job}: {future.result()}", file=sys.stderr)
                    except (CommandError, UserError, OSError) as error:
                        failed[str(job)] = str(error)
                        bar.write(f"{job}: FAILED, {error}", file=sys.stderr)
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.processes):
                    process.terminate()
                raise
        return failed

    def call(self, module: str, options: dict[str, Any], folder: Path) -> None:
        """Run ``python -m clpl_moe.<module>`` with these options; its output is appended to the folder's ``log.txt``.

        It keeps others from what it writes by itself, also if this process is killed.
        """
        config, log = folder / f"{module}.yaml", folder / "log.txt"
        write_yaml(config, options)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        with self._starting:
            self._server = server = self._server or Server(environment)
        slot = self.slots.popleft()
        code: int | None = None
        try:
            if self.gpus:
                visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.gpus)))).split(",")
                environment["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
            with log.open("ab") as output:
                start = output.tell()
                process = server.start(f"clpl_moe.{module}", ["--config", str(config)], environment, output.fileno())
            self.processes.add(process)
            code = process.wait()
            self.processes.discard(process)
        except ServerEnded as end:
            code, self._server = end.code, None
        finally:
            self.slots.append(slot)
        if code != 0:
            ended = "was killed" if code is None else f"ended with code {code}"
            raise CommandError(f"{module} {ended}: {_last_words(log, start)} ({log})")


def _last_words(log: Path, start: int) -> str:
    """The error, or else the last line, of a log from a byte on."""
    said = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines[-20:] if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]


def prepare(job: CollectionJob) -> str:
    counts = job.prepare.reader.write(job.directory / job.language, job.prepare.titles)
    return ", ".join(f"{counts[name]:,} {name}" for name in ("passages", "train queries", "dev queries"))


def mine(shop: Workshop, job: MineJob) -> str:
    with writing(job.folder, inside=True):
        write_json(job.folder / OPTIONS_FILE, job.decisive.values)
        collection = job.collection
        places = {"collection": str(collection.directory), "language": collection.language, "output": str(job.data)}
        shop.call("mine", job.options | places, job.folder)
    with job.data.open(encoding="utf-8") as file:
        return f"{sum(1 for _ in file):,} lines"


def train_and_evaluate(shop: Workshop, run: Run, keep_model: bool, metric: str) -> str:
    """Do a run, or the rest of one."""
    collection, language = run.collection, run.collection.language
    with writing(run.folder, inside=True):
        write_json(run.folder / OPTIONS_FILE, run.decisive.values)
        model = run.folder / "model"
        if run.train is not None and not (model / "README.md").is_file():  # training writes its card last
            places = {"{collection}": str(collection.directory), "{language}": language}
            if run.mined is not None:
                places["{train_data}"] = str(run.mined.data)
            options = {name: _fill(value, places) for name, value in run.train.items()}
            options |= {"output_dir": str(model), "resume_from_checkpoint": "true"}
            shop.call("train", options, run.folder)
        places = {"collection": str(collection.directory), "output": str(run.folder / "results")}
        evaluated = {"model": run.model if run.train is None else str(model), "languages": language, "overwrite": True}
        shop.call("evaluate", run.evaluate | evaluated | places, run.folder)
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
        _remove_weights(run, keep_model)
    return f"{metric} {run.metric(metric):.4f}"


def clear(job: MineJob | Run, keep_model: bool) -> None:
    """Clear the folder of a finished job that was killed at its very end."""
    if (job.folder / WORK_FOLDER).exists():
        with contextlib.suppress(UserError), writing(job.folder, inside=True):
            if isinstance(job, Run):
                _remove_weights(job, keep_model)


def _remove_weights(run: Run, keep_model: bool) -> None:
    """Remove checkpoints and, unless it is to be kept, the model, also as it was before its experts were merged."""
    for path in run.folder.glob("model/checkpoint-*"):
        shutil.rmtree(path)
    for pattern in () if keep_model else ("*.safetensors", "*.bin", "*.pt"):
        for path in run.folder.glob(f"model/**/{pattern}"):
            path.unlink()


def _fill(value: Any, places: dict[str, str]) -> Any:
    """An option of training with places for its placeholders."""
    if isinstance(value, list):
        return [_fill(one, places) for one in value]
    if isinstance(value, str):
        for name, place in places.items():
            value = value.replace(name, place)
    return value


def _training(run: Run, model: Path) -> dict[str, Any] | None:
    """Steps, duration, peak memory in bytes and precision of a run that was trained."""
    if run.train is None or (end := RunCourse.read(model, run.row).end) is None:
        return None
    options = run.decisive.values
    precision = "bfloat16" if options["train.bf16"] else "float16" if options["train.fp16"] else "float32"
    duration = {"steps": end["step"], "seconds": round(end["train_runtime"], 1)}
    return {**duration, "peak_bytes": end.get("train_peak_memory"), "precision": precision}
