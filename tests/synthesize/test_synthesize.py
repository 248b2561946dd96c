import re
from collections import Counter

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import read_jsonl, write_jsonl
from clpl_moe.data.schema import find_faults
from clpl_moe.retrieval.collection import read_positive_queries
from clpl_moe.synthesize import Synthesized, synthesize
from clpl_moe.synthesize.__main__ import main
from clpl_moe.synthesize.job import fill, load_prompt
from helpers.synthesis import SERVER, STAND_IN, arguments, good, refused, results, text, train_file

pytest.importorskip("openai")


def test_each_passage_without_a_query_is_asked_once_and_its_lines_are_filled(llm, tmp_path, capfd):
    server = llm()
    first = {
        "query": "물음",
        "pos": [text(9)],
        "neg": [text(1), "  ".join(text(1).split(" ")), text(2), text(3), text(9)],
        "neg_q": [None, [], ["아는 물음"], "또 아는 물음", None],
        "pos_ids": ["p9"],
        "neg_ids": ["p1", "p1twin", "p2", "p3", "p9"],
        "kept": {"as": "it is"},
    }
    other = {"query": "다른 물음", "pos": ["답"], "neg": [text(2), text(1), text(9), text(4)]}
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write_jsonl(files[0], [first])
    write_jsonl(files[1], [other])
    main(arguments(server, files, tmp_path))
    assert Counter(entry["passage"] for entry in server.log()) == {"1": 1, "4": 1}
    lines, store, failures = results(tmp_path)
    # Of passage 9 the only known query is that of the line itself, where it stands as a negative too.
    assert lines[0] == first | {"neg_q": [good(1), good(1), ["아는 물음"], "또 아는 물음", None]}
    assert lines[1] == other | {"neg_q": [["아는 물음"], good(1), ["물음"], good(4)]}
    assert not [fault for line in lines for fault in find_faults(line)]
    assert dict(read_positive_queries(tmp_path / "out.positive_queries.jsonl")) == store
    assert store == {"p1": good(1), "p1twin": good(1)}
    assert not failures
    output = capfd.readouterr().out
    for row in ("without a query +2", "requests sent, retries included +2", "tokens of prompts, of all runs +200"):
        assert re.search(row + "\n", output), row
    assert re.search(r"tokens of answers, of all runs +14\n", output)
    assert re.search(r"without an id: not in the store +1\n", output)


@pytest.mark.parametrize("language", ["ko", "fa", "hi"])
def test_the_example_server_writes_queries_for_the_samples(llm, tmp_path, language):
    sample = SERVER.parents[2] / "data" / "samples" / language / "train.jsonl"
    options = {"language": language, "known_queries": "false", "queries_per_passage": 2, "concurrency": 2}
    write_jsonl(tmp_path / "bare.jsonl", ({**record, "neg_q": None} for _, record in list(read_jsonl(sample))[::12]))
    main(arguments(llm(STAND_IN), tmp_path / "bare.jsonl", tmp_path, **options))
    lines, store, failures = results(tmp_path)
    assert not failures
    assert len(store) > 80
    assert all(len(queries) == 2 for line in lines for queries in line["neg_q"])


def test_known_queries_elsewhere_can_be_left_aside(llm, tmp_path):
    server = llm()
    records = [
        {"query": "물음", "pos": [text(1)], "neg": [text(2), text(3)], "neg_q": [["아는 물음"], None]},
        {"query": "다른 물음", "pos": ["답"], "neg": [text(1), text(2)]},
    ]
    write_jsonl(tmp_path / "train.jsonl", records)
    main(arguments(server, tmp_path / "train.jsonl", tmp_path, known_queries="false"))
    assert Counter(entry["passage"] for entry in server.log()) == {"1": 1, "2": 1, "3": 1}
    lines, _, _ = results(tmp_path)
    assert [line["neg_q"] for line in lines] == [[["아는 물음"], good(3)], [good(1), good(2)]]


def test_answers_of_no_use_are_asked_for_once_more_and_then_recorded(llm, tmp_path, capfd):
    bad = ["empty", "wrong language", "copied", "long", "malformed", "no choices"]
    plan = {str(i): [what] for i, what in enumerate(bad)} | {str(10 + i): [what] * 2 for i, what in enumerate(bad)}
    plan |= {"16": ["empty", "500…"], "17": ["400…"], "18": ["surrogate"]}
    server = llm(plan)
    files = [train_file(tmp_path, 6), train_file(tmp_path, 9, first=10)]
    main(arguments(server, files, tmp_path, max_retries=1))
    lines, store, failures = results(tmp_path)
    assert store == {f"p{n}": good(n) for n in range(6)} | {"p18": ["18번째 물음은 � 무엇인가요?"]}
    reasons = ["empty", "wrong script", "copied from the passage", "too long", "reply not readable"]
    expected = {f"p{10 + i}": reason for i, reason in enumerate([*reasons, reasons[-1]])}
    assert {i: failures[i] for i in expected} == expected
    assert failures["p16"].startswith("HTTP 500: your key is")
    assert failures["p17"].startswith("HTTP 400: ")
    assert len(failures) == 8
    asked = Counter(entry["passage"] for entry in server.log())
    assert {asked[str(n)] for n in (*range(6), *range(10, 16))} == {2}
    # null where there is no query, so that the line is still of use
    assert lines[-1]["neg_q"] == [store["p18"]]
    output = capfd.readouterr().out
    assert re.search(r"passages without a query +8\n", output)
    assert re.search(r"  reply not readable +2\n", output)
    assert "2 passages had no answer: the same command with overwrite set asks about these again" in output
    # Only these two are asked again: what was paid for, of no use too, is never asked for a third time.
    main(arguments(server, files, tmp_path, max_retries=0, overwrite="true"))
    again = Counter(entry["passage"] for entry in server.log()) - asked
    assert again == {"16": 1, "17": 1}


def test_dry_run_asks_and_writes_nothing(tmp_path, capfd):
    path = train_file(tmp_path, 10)
    main(arguments(None, path, tmp_path, base_url="http://127.0.0.1:9/v1", dry_run="true"))
    output = capfd.readouterr().out
    tokens = sum(len(fill(load_prompt("ko"), text(n), 1).encode()) for n in range(10)) // 4
    assert re.search(r"requests to make +10\n", output)
    assert re.search(rf"tokens of their prompts, roughly +{tokens:,}\n", output)
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_job_writes_the_same_again_without_a_request(llm, tmp_path, capfd):
    server = llm({"1": ["empty", "empty"]})
    argv = arguments(server, train_file(tmp_path, 6), tmp_path)
    main(argv)
    before = results(tmp_path)
    assert "set overwrite" in refused(capfd, argv)
    server.process.kill()
    main([*argv, "--overwrite=true"])
    assert results(tmp_path) == before
    assert len(server.log()) == 7


def test_an_output_among_the_training_data_is_refused(tmp_path, capfd):
    """Or the journal would be read as training data when the command goes on."""
    path = train_file(tmp_path, 2)
    message = refused(capfd, arguments(None, tmp_path, tmp_path, base_url="http://127.0.0.1:9/v1"))
    assert "lies in a folder of train_data" in message
    assert list(tmp_path.iterdir()) == [path]


def test_the_training_data_is_not_replaced_even_if_asked(tmp_path, capfd):
    path = train_file(tmp_path, 2)
    before = path.read_text()
    argv = arguments(None, path, tmp_path, base_url="http://127.0.0.1:9/v1", overwrite=True, output=path)
    assert "this command reads the file" in refused(capfd, argv)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_a_killed_job_began_are_replaced_and_others_are_not(llm, tmp_path, capfd, monkeypatch):
    argv = arguments(llm(), train_file(tmp_path, 2), tmp_path)

    def killed(path, records):
        write_jsonl(path, records)
        raise KeyboardInterrupt

    for options in ([], ["--overwrite=true"]):
        with monkeypatch.context() as patch:
            patch.setattr("clpl_moe.synthesize.job.write_jsonl", killed)
            with pytest.raises(SystemExit):
                main([*argv, *options])
        if options:
            assert "set overwrite" in refused(capfd, argv)
        else:
            main(argv)
    names = ["out.failures.jsonl", "out.journal.jsonl", "out.jsonl", "out.positive_queries.jsonl"]
    assert sorted(path.name for path in tmp_path.glob("*out*")) == names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"queries_per_passage": 0}, "--queries_per_passage: found 0"),
        ({"temperature": -1}, "--temperature"),
        ({"timeout": 0}, "--timeout"),
        ({"base_url": "localhost:8000"}, "--base_url: expected an address"),
        ({"base_url": "http://me:secret@localhost/v1"}, "the key belongs in the environment"),
        ({"request_options": "[1]"}, "expected a JSON object"),
        ({"request_options": '{"top_p": NaN}'}, "expected a JSON object"),
        ({"request_options": '{"top_p": "\\ud800"}'}, "expected a JSON object"),
        ({"request_options": "[" * 3000 + "]" * 3000}, "expected a JSON object"),
        (
            {"request_options": '{"extra_headers": {"Ocp-Apim-Subscription-Key": "x"}}'},
            "'Ocp-Apim-Subscription-Key', which",
        ),
        ({"request_options": '{"extra_body": [{"clientSecret": "x"}]}'}, "holds 'clientSecret'"),
        ({"request_options": '{"OPENAI_API_KEY": "x"}'}, "holds 'OPENAI_API_KEY'"),
        ({"temperature": "inf"}, "--temperature: found inf"),
        ({"temperature": "1e-320"}, "--temperature: found 1e-320, expected 0 or at least 0.001"),
        ({"round_trip_model": "no/where"}, "no/where: neither a folder here nor a model"),
        ({"round_trip_model": ".", "round_trip_collection": "none"}, "none: no such folder"),
        ({"api_key_env": "NO_SUCH_NAME"}, "--api_key_env: the environment has no variable"),
        ({"language": "../x"}, "language"),
        ({"output": ""}, "--output: found '', expected the name of a file"),
        ({"output": "/"}, "--output: found '/', expected the name of a file"),
        ({"backend": "transformers"}, "--base_url: goes with backend server, not with transformers"),
        ({"prompt": "x"}, "did you mean 'prompts'?"),
        ({"round_trip_collection": "x"}, "--round_trip_collection: goes with round_trip_model, which is not set"),
        ({"round_trip_top": 5}, "--round_trip_top: goes with round_trip_model, which is not set"),
        ({"passage_max_len": 64}, "--passage_max_len: goes with round_trip_model, which is not set"),
        ({"revision": "main"}, "--revision: goes with backend transformers, not with server"),
    ],
)
def test_mistakes_end_in_a_message(tmp_path, capfd, options, words):
    options = {"base_url": "http://127.0.0.1:9/v1"} | options
    assert words in refused(capfd, arguments(None, train_file(tmp_path, 2), tmp_path, **options))
    assert [path.name for path in tmp_path.iterdir()] == ["train0.jsonl"]


def test_called_from_python(llm, tmp_path, capfd):
    server = llm({"1": ["empty", "empty"], "2": ["500…"]})
    options = {"language": "ko", "model": "writer", "max_retries": 0, "timeout": 60.0, "base_url": server.url}
    options |= {"train_data": [train_file(tmp_path, 4)], "output": tmp_path / "out.jsonl"}
    planned = synthesize(**options, dry_run=True)
    assert isinstance(planned, Synthesized)
    assert (planned.plan["requests to make"], planned.counts, planned.paths) == (4, {}, [])
    done = synthesize(**options)
    assert done.plan == planned.plan
    assert done.counts["queries written"] == 2
    assert done.unanswered == 1
    assert [path.name for path in done.paths] == ["out.jsonl", "out.positive_queries.jsonl", "out.failures.jsonl"]
    assert results(tmp_path)[1] == {"p0": good(0), "p3": good(3)}
    assert capfd.readouterr().out == ""
    with pytest.raises(UserError, match="queries_per_passage: found 0, expected at least 1"):
        synthesize(**options, queries_per_passage=0)
