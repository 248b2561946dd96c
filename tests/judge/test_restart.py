import json
import random
import re
import signal
from collections import Counter

import pytest

from clpl_moe.judge.__main__ import main
from clpl_moe.validate import validate
from helpers.holding import held
from helpers.judging import asked, false_negatives, line, query, results, train_file
from helpers.synthesis import arguments, json_lines, kill_while_answers_are_held, refused, start, wait_for

pytest.importorskip("openai")

KEY = "sk-Very5ecret-0123456789"


def test_a_half_written_answer_is_asked_for_again(llm, tmp_path):
    server = llm()
    argv = arguments(server, train_file(tmp_path, [line(n, "no", "yes") for n in range(1, 6)]), tmp_path, concurrency=1)
    main(argv)
    journal = tmp_path / "out.journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-9])
    main([*argv, "--overwrite=true"])
    assert Counter(e["passage"] for e in server.log()) == {"q1": 1, "q2": 1, "q3": 1, "q4": 1, "q5": 2}
    assert journal.read_bytes() == whole


def test_other_groups_of_passages_are_asked_about_those_alone_that_have_no_verdict(llm, tmp_path):
    server = llm({"q1": ["401…"]})
    path = train_file(tmp_path, [line(n, *["no"] * 5) for n in (3, 2, 1)])
    with pytest.raises(SystemExit):
        main(arguments(server, path, tmp_path, concurrency=1, passages_per_question=2))
    other = llm()
    main(arguments(other, path, tmp_path, passages_per_question=3, seed=1))
    assert {number for number, _ in asked(other)} == {"q1"}
    assert set(asked(other).values()) == {1}


def test_a_journal_of_other_settings_or_of_synthesize_is_refused(llm, tmp_path, capfd):
    server = llm()
    path = train_file(tmp_path, [line(1, "no")])
    main(arguments(server, path, tmp_path))
    (tmp_path / "out.jsonl").unlink()
    message = refused(capfd, arguments(server, path, tmp_path, model="another"), main)
    assert 'model was "writer", now "another"' in message
    journal = tmp_path / "out.journal.jsonl"
    with held(journal):
        assert f"{journal}: process " in refused(capfd, arguments(server, path, tmp_path), main)
    lines = json_lines(journal)
    lines[0]["journal"] = "clpl_moe.synthesize 1"
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    message = refused(capfd, arguments(server, path, tmp_path), main)
    assert 'out.journal.jsonl:1: found journal, settings, expected "journal": "clpl_moe.judge 1"' in message


@pytest.mark.slow
def test_200_queries_are_judged_through_two_kills_and_paid_for_once(llm, tmp_path):
    """Through the command line, with the key in the environment and the client's own debug log on."""
    rng = random.Random(0)
    useless = ["malformed", "empty", "wrong language", "contradiction"]
    trouble = ["429", "500", "timeout", "cut", "cut in the middle", "html", *useless]
    plan = {f"q{n}": [rng.choice(trouble)] for n in rng.sample(range(1, 201), 50)}
    plan |= {"q7": ["empty"] * 4, "q8": ["500…"]}
    server = llm(plan, seconds=0.05)
    lines = [line(n, *rng.choices(["yes", "partly", "no", "no"], k=5), "no") for n in range(1, 201)]
    before = false_negatives(lines)
    assert before > 400
    options = {"concurrency": 6, "timeout": 10}
    argv = arguments(server, train_file(tmp_path, lines), tmp_path, **options)
    environment = {"OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug"}
    journal = tmp_path / "out.journal.jsonl"
    paid = ("good", *useless)
    outputs = []
    # Each time while all that is under way is with the server, which holds its answers: nothing at all is lost.
    for enough in (60, 130):
        job = start("clpl_moe.judge", argv, **environment)
        outputs += kill_while_answers_are_held(job, server, journal, enough, paid, concurrency=6)
        assert not (tmp_path / "out.jsonl").exists()
    job = start("clpl_moe.judge", argv, **environment)
    outputs += job.communicate(timeout=900)
    assert job.returncode == 0, outputs[-1]

    # Every answer that was sent is in the journal, and no passage had a second one after a verdict.
    assert len(json_lines(journal)) == 1 + len(server.log(*paid))
    assert set(asked(server, "good").values()) == {1}
    bad = asked(server, *useless)
    assert max(bad.values()) == 2
    assert {number for (number, _), count in bad.items() if count == 2} <= {"q7"}

    found, verdicts = results(tmp_path)
    assert Counter(answers for answers in verdicts.values() if answers is None).total() == 12
    kept = {record["query"]: record for record in found}
    assert kept[query(7)] == lines[6]
    assert kept[query(8)] == lines[7]
    assert false_negatives(record for record in found if record["query"] not in (query(7), query(8))) == 0
    assert len(found) == 200  # each has a negative that does not answer
    assert validate(train_data=[str(tmp_path / "out.jsonl")]).faults == 0

    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) == 4
    for written in [*outputs, *(path.read_text() for path in files)]:
        assert KEY not in written


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_the_job_goes_on(llm, tmp_path):
    server = llm(seconds=0.1)
    lines = [line(n, "yes", "no") for n in range(1, 41)]
    argv = arguments(server, train_file(tmp_path, lines), tmp_path, concurrency=2)
    server.hold(*(f"q{n}" for n in range(11, 41)))  # so that it is not over before
    job = start("clpl_moe.judge", argv)
    wait_for(lambda: len(server.log()) > 5)
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 130
    assert "Traceback" not in errors
    assert re.search(r"\d answers are in \S+: the same command goes on from there\ninterrupted\n$", errors)
    server.release()
    job = start("clpl_moe.judge", argv)
    job.communicate(timeout=900)
    assert job.returncode == 0
    assert false_negatives(results(tmp_path)[0]) == 0
    assert len(server.log("good")) <= 40 + 2
