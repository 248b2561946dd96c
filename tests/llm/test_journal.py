import json
import random
import re
import signal
import time
from collections import Counter

import pytest

from clpl_moe.llm.backends import Answer
from clpl_moe.llm.journal import Journal
from clpl_moe.synthesize.__main__ import main
from clpl_moe.synthesize.job import JOURNAL
from clpl_moe.synthesize.passages import passage_key
from helpers.holding import held
from helpers.synthesis import (
    arguments,
    good,
    json_lines,
    kill_while_answers_are_held,
    refused,
    results,
    start,
    text,
    train_file,
    wait_for,
)

pytest.importorskip("openai")


KEY = "sk-Very5ecret-0123456789"


def test_a_half_written_answer_is_asked_for_again(llm, tmp_path):
    server = llm()
    argv = arguments(server, train_file(tmp_path, 5), tmp_path, concurrency=1)
    main(argv)
    journal = tmp_path / "out.journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-9])
    main([*argv, "--overwrite=true"])
    assert Counter(e["passage"] for e in server.log()) == {"0": 1, "1": 1, "2": 1, "3": 1, "4": 2}
    assert journal.read_bytes() == whole


def test_a_journal_of_other_settings_is_refused(llm, tmp_path, capfd):
    server = llm()
    path = train_file(tmp_path, 2)
    main(arguments(server, path, tmp_path))
    (tmp_path / "out.jsonl").unlink()
    message = refused(capfd, arguments(server, path, tmp_path, model="another", temperature=1))
    assert 'model was "writer", now "another"; request was {}, now {"temperature": 1.0}' in message
    assert "set overwrite" in message
    main(arguments(server, path, tmp_path, model="another", overwrite="true"))
    assert len(server.log()) == 4
    # The address and how fast it is asked are no part of what is asked.
    main(arguments(llm(), path, tmp_path, model="another", concurrency=2, overwrite="true"))
    assert len(server.log()) == 4


def test_a_journal_that_is_none_is_named(tmp_path, capfd):
    path = train_file(tmp_path, 2)
    journal = tmp_path / "out.journal.jsonl"
    argv = arguments(None, path, tmp_path, base_url="http://127.0.0.1:9/v1")
    journal.write_text('{"query": "x"}\n')
    assert "out.journal.jsonl:1: found query, expected" in refused(capfd, argv)
    for other in ("mine", '{"journal": "mine', "[1]"):  # no line that was cut short, either
        journal.write_text(other)
        assert "out.journal.jsonl:1: found another file" in refused(capfd, argv)
        assert journal.read_text() == other
    journal.unlink()
    with Journal(journal, JOURNAL, {"model": "writer"}) as open_journal:
        open_journal.add("k", Answer("x"))
    with held(journal):
        assert f"{journal}: process " in refused(capfd, argv)
    with journal.open("a") as file:
        file.write('{"passage": "k", "sum": 1}\n')
    assert "out.journal.jsonl:3: found sum, expected an answer" in refused(capfd, argv)
    whole = '{"passage": "k", "text": "x", "cut": false, "prompt_tokens": 1, "answer_tokens": 1}'
    for name, value in (("text", 1), ("cut", 0), ("prompt_tokens", "1"), ("answer_tokens", True), ("cut", None)):
        line = json.dumps(json.loads(whole) | {name: value})
        journal.write_text(f"{journal.read_text().splitlines()[0]}\n{line}\n")
        assert "out.journal.jsonl:2: found " in refused(capfd, argv)


@pytest.mark.slow
def test_a_killed_job_has_all_answers_and_paid_for_none_twice(llm, tmp_path):
    """Through the command line, with the key in the environment and the client's own debug log on."""
    rng = random.Random(0)
    useless = ["malformed", "empty", "wrong language"]
    trouble = ["429", "500", "timeout", "cut", "cut in the middle", "html", *useless]
    plan = {str(n): rng.choices(trouble, k=2) for n in rng.sample(range(150), 40)}
    plan = {n: [first] if {first, second} <= {*useless} else [first, second] for n, (first, second) in plan.items()}
    plan |= {"150": ["empty", "empty"], "151": ["wrong language", "malformed"], "152": ["500…"]}
    server = llm(plan, seconds=0.05)
    files = [train_file(tmp_path, 120), train_file(tmp_path, 100, first=100)]
    argv = arguments(server, files, tmp_path, concurrency=6, timeout=10)
    environment = {"OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug"}
    journal = tmp_path / "out.journal.jsonl"
    paid = ("good", *useless)
    outputs = []

    # Twice while all that is under way is with the server, which holds its answers: nothing at all is lost.
    for enough in (60, 120):
        job = start("clpl_moe.synthesize", argv, **environment)
        outputs += kill_while_answers_are_held(job, server, journal, enough, paid, concurrency=6)
    given = Counter((entry["passage"], entry["what"] == "good") for entry in server.log(*paid))
    assert max(given.values()) == 1

    # Once more, at no chosen moment.
    server.hold("199")  # so that it is not over before
    job = start("clpl_moe.synthesize", argv, **environment)
    wait_for(lambda: len(server.log(*paid)) > 160)
    time.sleep(rng.random() / 10)
    job.send_signal(signal.SIGKILL)
    outputs += job.communicate()
    assert job.returncode == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()
    server.release()

    job = start("clpl_moe.synthesize", argv, **environment)
    outputs += job.communicate(timeout=900)
    assert job.returncode == 0, outputs[-1]

    lines, store, failures = results(tmp_path)
    assert failures.keys() == {"p150", "p151", "p152"}
    assert failures["p150"] == "empty"
    assert failures["p151"] == "reply not readable"
    assert failures["p152"].startswith("HTTP 500")
    assert store == {f"p{n}": good(n) for n in range(200) if n not in (150, 151, 152)}
    assert all(queries or i in failures for r in lines for i, queries in zip(r["neg_ids"], r["neg_q"]))

    # None was paid for twice, but for what was on its way at the third kill: an answer to each request at most.
    sent = server.log(*paid)
    numbers = {passage_key(text(n)): str(n) for n in range(200)}
    kept = Counter(numbers[record["passage"]] for record in json_lines(journal)[1:])
    lost = Counter(entry["passage"] for entry in sent)
    lost.subtract(kept)
    assert min(lost.values()) == 0
    assert lost.total() <= 6
    allowed = {("150", False): 2, ("151", False): 2}
    given = Counter((entry["passage"], entry["what"] == "good") for entry in sent)
    assert {key: n for key, n in given.items() if n > allowed.get(key, 1) + lost[key[0]]} == {}
    assert max(kept.values()) == 2
    print(f"{len(sent)} answers sent, {lost.total()} lost at the third kill")

    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) == 6
    for written in [*outputs, *(path.read_text() for path in files)]:
        assert KEY not in written


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_the_job_goes_on(llm, tmp_path):
    server = llm(seconds=0.1)
    argv = arguments(server, train_file(tmp_path, 40), tmp_path, concurrency=2)
    server.hold(*map(str, range(10, 40)))  # so that it is not over before
    job = start("clpl_moe.synthesize", argv)
    wait_for(lambda: len(server.log()) > 5)
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 130
    assert "Traceback" not in errors
    assert re.search(r"\d answers are in \S+: the same command goes on from there\ninterrupted\n$", errors)
    before = len(json_lines(tmp_path / "out.journal.jsonl"))
    assert 3 < before <= 1 + 10
    server.release()
    job = start("clpl_moe.synthesize", argv)
    job.communicate(timeout=900)
    assert job.returncode == 0
    assert len(results(tmp_path)[1]) == 40
    assert len(server.log("good")) <= 40 + 2
