"""Kills jobs at random moments, runs them again, and compares what they leave with what an undisturbed run leaves.

    PYTHONPATH=tests python tests/end_to_end/kills.py train --times 40
    PYTHONPATH=tests python tests/end_to_end/kills.py mine evaluate synthesize judge prepare merge --times 20
    PYTHONPATH=tests python tests/end_to_end/kills.py --together

Each run is the fork of a process that has imported everything; it is killed for a random part of an undisturbed run's time,
up to three times, with SIGKILL, SIGTERM or SIGINT in turn. Then the same command runs to its end. Folders are compared file
by file: nothing may be missing, differ, or be left over. Times of day and durations are no difference. With ``--together``
two runs of each command start at once on one output: one has to go on, and the other to end with exit code 2.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clpl_moe.train.checksums import STATE_FILE

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# What a killed run may end with, besides the signal itself.
CODES = {0, 130, 143}
TIMES = re.compile(r"seconds|runtime|per_second|peak_memory")


@dataclass
class Job:
    """A command and where it writes: in the folder ``output``, which each run finds empty.

    Attributes:
        main: of the command.
        argv: of the first run.
        again: of all others.
        over: the file that is written last, where a run that finds it is refused.
        before: makes what the first run finds.
    """

    main: Callable[[list[str]], Any]
    argv: list[str]
    again: list[str]
    over: Path | None = None
    before: Callable[[], None] | None = None

    def clear(self, output: Path) -> None:
        """Make the output as the first run finds it."""
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        if self.before is not None:
            self.before()


def train(folder: Path, number: int) -> Job:
    """A training with evaluations, checkpoints, dropout, and mining in every other one."""
    import clpl_moe.evaluate.evaluation
    import clpl_moe.train.runner  # noqa: F401
    from clpl_moe.train.__main__ import main
    from helpers.tiny_training import arguments, make_collection, write_triplets

    data = write_triplets(folder / "train.jsonl", 14)
    collection = make_collection(folder / "dev")
    for name in ("queries", "qrels"):
        (collection / "ko" / f"train_{name}.jsonl").write_bytes((collection / "ko" / f"dev_{name}.jsonl").read_bytes())
    options: dict[str, Any] = {"max_steps": 16, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    options |= {"save_steps": 3, "logging_steps": 2, "dev_collection": collection, "dev_language": "ko"}
    if number % 2:
        options |= {"ance_refresh": 4, "ance_collection": collection, "ance_language": "ko"}
        options |= {"ance_rank_to": 10, "ance_negatives": 4, "ance_max_positive_ratio": 0}
    argv = arguments(_model_with_dropout(folder), data, folder / "output" / "run", **options)
    return Job(main, argv, [*argv, "--resume_from_checkpoint", "true"])


def _model_with_dropout(folder: Path) -> Path:
    from helpers.tiny import make_encoder, make_tokenizer

    if not (folder / "model").exists():
        tokenizer = make_tokenizer()
        dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        make_encoder(vocab_size=len(tokenizer), max_position_embeddings=130, **dropout).save_pretrained(
            folder / "model"
        )
        tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def mine(folder: Path, number: int) -> Job:
    """Mining from embeddings in many shards."""
    from clpl_moe.mine.__main__ import main
    from clpl_moe.retrieval import store
    from helpers.ablation import make_collection

    store.SHARD_TEXTS = 2
    output = folder / "output" / "train.jsonl"
    argv = ["--model", _model_with_dropout(folder), "--collection", make_collection(folder / "data"), "--language=ko"]
    argv += ["--output", output, "--rank_to=10", "--negatives=4", "--passage_max_len=40", "--dtype=float32"]
    argv = [*map(str, argv)]
    return Job(main, argv, argv, output)


def evaluate(folder: Path, number: int) -> Job:
    """An evaluation of two models on two languages; in every other one with BGE-M3's heads."""
    import torch

    from clpl_moe.evaluate.__main__ import main
    from clpl_moe.retrieval import store
    from helpers.ablation import make_collection

    store.SHARD_TEXTS = 4
    data = make_collection(make_collection(folder / "data"), "fa")
    models = [_model_with_dropout(folder), folder / "second"]
    if not models[1].exists():
        shutil.copytree(models[0], models[1])
        torch.manual_seed(0)
        torch.save(torch.nn.Linear(32, 1).state_dict(), models[1] / "sparse_linear.pt")
        torch.save(torch.nn.Linear(32, 32).state_dict(), models[1] / "colbert_linear.pt")
    argv = ["--model", *models, "--collection", data, "--languages", "ko", "fa", "--output", folder / "output" / "r"]
    argv = [*map(str, argv), "--passage_max_len=40", "--dtype=float32", f"--m3_scores={number % 2 == 1}"]
    return Job(main, argv, argv)


def synthesize(folder: Path, number: int) -> Job:
    """Questions to a server, whose answers are one of no use and one of use, then the round trip; in order."""
    from clpl_moe.retrieval import store
    from clpl_moe.synthesize.__main__ import main
    from helpers.synthesis import Llm, arguments, train_file

    store.SHARD_TEXTS = 4
    if folder not in _servers:
        _servers[folder] = Llm(folder / "server", {"3": ["wrong language…"]}, 0.005)
        atexit.register(_servers[folder].process.kill)
    (folder / "output").mkdir(exist_ok=True)
    options = {"round_trip_model": _model_with_dropout(folder), "passage_max_len": 40, "round_trip_top": 8}
    options |= {"concurrency": 1, "timeout": 60}
    argv = arguments(_servers[folder], train_file(folder, 24), folder / "output", **options)
    return Job(main, argv, argv, folder / "output" / "out.jsonl")


def prepare(folder: Path, number: int) -> Job:
    """A collection from files in SQuAD's shape."""
    from clpl_moe.prepare.__main__ import main
    from helpers.squad_files import many, squad

    source = squad(folder / "squad.json", *many(3000))
    argv = ["--squad", source, "--language=ko", "--output", folder / "output"]
    return _replacing(main, argv, folder / "output" / "ko" / "corpus.jsonl", number)


def merge(folder: Path, number: int) -> Job:
    """A mixture of two models."""
    import clpl_moe.merge.mix
    import clpl_moe.retrieval.options  # noqa: F401
    from clpl_moe.merge.__main__ import main

    base, output = _model_with_dropout(folder), folder / "output" / "merged"
    argv = ["--input", base, "--base", base, "--alpha", 0.5, "--output", output]
    return _replacing(main, argv, output / "merge.json", number)


def export(folder: Path, number: int) -> Job:
    """A model in another precision."""
    import clpl_moe.export.card
    import clpl_moe.export.format_2024
    import clpl_moe.export.onnx_graph
    import clpl_moe.export.vocabulary  # noqa: F401
    from clpl_moe.export.__main__ import main

    output = folder / "output" / "exported"
    argv = ["--input", _model_with_dropout(folder), "--dtype=bfloat16", "--output", output]
    return _replacing(main, argv, output / "export.json", number)


def _replacing(main: Callable[[list[str]], Any], argv: list[Any], file: Path, number: int) -> Job:
    """A command that writes the folder of ``file`` as a whole; with an odd number, one of its kind stands there before."""
    argv = [*map(str, argv), f"--overwrite={number % 2 == 1}"]

    def before() -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text("old")

    return Job(main, argv, argv, before=before) if number % 2 else Job(main, argv, argv, file)


def judge(folder: Path, number: int) -> Job:
    """Scores of an encoder, then questions to a server, one of whose answers are of no use; in order."""
    from clpl_moe.judge.__main__ import main
    from clpl_moe.retrieval import store
    from helpers.judging import line, train_file
    from helpers.synthesis import Llm, arguments

    store.SHARD_TEXTS = 4
    if folder not in _servers:
        _servers[folder] = Llm(folder / "server", {"q3": ["wrong language…"]}, 0.005)
        atexit.register(_servers[folder].process.kill)
    (folder / "output").mkdir(exist_ok=True)
    lines = [line(n, "yes", "no", "partly", "no") for n in range(1, 13)]
    options = {"score_model": _model_with_dropout(folder), "passage_max_len": 40, "margin": 2, "positives": "true"}
    options |= {"concurrency": 1, "timeout": 60, "passages_per_question": 3}
    argv = arguments(_servers[folder], train_file(folder, lines), folder / "output", **options)
    return Job(main, argv, argv, folder / "output" / "out.jsonl")


_servers: dict[Path, Any] = {}

JOBS: dict[str, Callable[[Path, int], Job]] = {
    "train": train,
    "mine": mine,
    "evaluate": evaluate,
    "synthesize": synthesize,
    "judge": judge,
    "prepare": prepare,
    "merge": merge,
    "export": export,
}


def start(job: Job, argv: list[str], log: Path) -> int:
    """Start a command in a process of its own; its id."""
    child = os.fork()
    if child == 0:
        # Forks share a lock for bars: killed as it draws one, a run would leave it locked for all others.
        tqdm.set_lock(threading.RLock())
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setpgid(0, 0)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = 0
        try:
            job.main(argv)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        os._exit(code)
    return child


def run(job: Job, argv: list[str], log: Path, kill: tuple[float, int] | None = None) -> int:
    """The exit code of a command in a process of its own, negative for a signal; ``kill``: seconds, and a signal."""
    child = start(job, argv, log)
    end = None if kill is None else time.monotonic() + kill[0]
    while True:
        done, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            os.kill(child, kill[1])
            end = None
        time.sleep(0.002)


def differences(found: Path, expected: Path) -> list[str]:
    """What two folders do not share, a line each."""
    files = [{p.relative_to(f) for p in f.rglob("*")} for f in (found, expected)]
    lines = [f"left over: {p}" for p in sorted(files[0] - files[1])]
    lines += [f"missing: {p}" for p in sorted(files[1] - files[0])]
    both = [p for p in sorted(files[0] & files[1]) if (expected / p).is_file()]
    return lines + [f"differs: {p}" for p in both if not _same(found / p, expected / p)]


def _same(found: Path, expected: Path) -> bool:
    first, second = found.read_bytes(), expected.read_bytes()
    if first == second:
        return True
    try:
        if expected.suffix == ".json":
            return _without_times(json.loads(first)) == _without_times(json.loads(second))
        if expected.suffix == ".jsonl":
            lines = [[_without_times(json.loads(line)) for line in text.splitlines()] for text in (first, second)]
            return lines[0] == lines[1]
    except ValueError:
        return False
    return False


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        # A checkpoint's state holds durations: so its checksum is another one, too.
        return {key: _without_times(v) for key, v in value.items() if not TIMES.search(key) and key != STATE_FILE}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def kill_and_compare(make: Callable[[Path, int], Job], times: int, seed: int, folder: Path) -> Counter[str]:
    """Counts of signals and of runs; prints what a killed job left otherwise than an undisturbed one."""
    counts: Counter[str] = Counter()
    draw = random.Random(seed)
    output, log = folder / "output", folder / "log.txt"
    undisturbed: dict[int, tuple[Path, float]] = {}
    for number in range(times):
        job = make(folder, number % 2)
        if number % 2 not in undisturbed:
            for _ in range(2):  # the second one finds every cache filled
                job.clear(output)
                began = time.monotonic()
                if run(job, job.argv, log) != 0:
                    raise SystemExit(f"the undisturbed run failed:\n{log.read_text()[-3000:]}")
                seconds = time.monotonic() - began
            expected = folder / f"expected{number % 2}"
            output.rename(expected)
            undisturbed[number % 2] = expected, seconds
            print(f"undisturbed: {seconds:.1f} s")
        expected, seconds = undisturbed[number % 2]
        job.clear(output)
        log.write_text("")
        argv, faults = job.argv, []
        for kill in range(draw.randint(1, 3)):
            sent = SIGNALS[(number + kill) % 3]
            refused = {2} if job.over is not None and job.over.exists() else set()
            code = run(job, argv, log, (draw.uniform(0, seconds), sent))
            counts[sent.name] += 1
            if code not in CODES | refused and code != -sent:
                faults.append(f"exit code {code} after {sent.name}")
            argv = job.again if any(output.iterdir()) else job.argv
        refused = {2} if job.over is not None and job.over.exists() else set()
        if (code := run(job, argv, log)) not in {0} | refused:
            faults.append(f"exit code {code} of the last run")
        faults += differences(output, expected)
        # Python itself swallows a Ctrl-C that comes while it removes an object, and says so.
        said = re.sub(r"Exception ignored in: .*?\nKeyboardInterrupt: *\n", "", log.read_text(), flags=re.DOTALL)
        if "Traceback" in said:
            faults.append("a traceback")
        counts["jobs"] += 1
        counts["faulty"] += bool(faults)
        for fault in faults:
            print(f"{number}: {fault}")
        if faults:
            print(said[max(0, said.find("Traceback")) :][:4000] if "Traceback" in said else said[-2000:])
    return counts


def run_together(make: Callable[[Path, int], Job], folder: Path) -> str:
    """Run a job twice at once, on one output; says how long the refused one took."""
    output, log = folder / "output", folder / "log.txt"
    job = make(folder, 1)
    job.clear(output)
    if run(job, job.argv, log) != 0:
        raise SystemExit(f"the undisturbed run failed:\n{log.read_text()[-3000:]}")
    output.rename(folder / "expected")
    job.clear(output)
    logs = [folder / "first.txt", folder / "second.txt"]
    began = time.monotonic()
    children = [start(job, job.argv, one) for one in logs]
    ended = {}
    while len(ended) < 2:
        child, status = os.wait()
        if child in children:
            ended[child] = os.waitstatus_to_exitcode(status), time.monotonic() - began
    (first, code), (_, other) = (ended[child][::-1] for child in sorted(ended, key=lambda c: -ended[c][0]))
    said = "".join(one.read_text() for one in logs)
    faults = differences(output, folder / "expected")
    if (code, other) != (2, 0) or "writes this output since" not in said or faults:
        raise SystemExit(f"exit codes {code} and {other}, {faults}:\n{said[-3000:]}")
    return f"one went on, the other ended with exit code 2 after {first:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join(JOBS)}; not given: all")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", action="store_true")
    options = parser.parse_args()
    for name in options.jobs or JOBS:
        with tempfile.TemporaryDirectory() as folder:
            if options.together:
                print(f"{name}: {run_together(JOBS[name], Path(folder))}", flush=True)
                continue
            began = time.monotonic()
            counts = kill_and_compare(JOBS[name], options.times, options.seed, Path(folder))
            kills = ", ".join(f"{s.name} {counts[s.name]}" for s in SIGNALS)
            seconds = time.monotonic() - began
            print(f"{name}: {counts['jobs']} jobs, {kills}; {counts['faulty']} faulty ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
