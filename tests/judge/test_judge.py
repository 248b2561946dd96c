import re
from collections import Counter

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_jsonl
from clpl_moe.data.schema import find_faults
from clpl_moe.judge import Judged, judge
from clpl_moe.judge.__main__ import main
from clpl_moe.validate import validate
from helpers.judging import asked, false_negatives, line, query, results, text, train_file
from helpers.synthesis import arguments, good, json_lines, refused

pytest.importorskip("openai")


def test_what_answers_becomes_a_positive_and_what_answers_in_part_goes(llm, tmp_path, capfd):
    server = llm()
    lines = [line(1, "no", "yes", "partly", "no") | {"kept": {"as": "it is"}}, line(2, "no", "no")]
    main(arguments(server, train_file(tmp_path, lines), tmp_path))
    found, verdicts = results(tmp_path)
    assert found[0] == {
        "query": query(1),
        "pos": [text(100, "answer 1."), text(102, "answer 1.")],
        "neg": [text(101), text(104)],
        "pos_scores": [0.8, 0.75],
        "neg_scores": [0.75, 0.75],
        "pos_ids": ["p100", "p102"],
        "neg_ids": ["p101", "p104"],
        "neg_q": [["물음 101"], None],
        "kept": {"as": "it is"},
    }
    assert found[1] == lines[1]
    assert verdicts == {"p101": "no", "p102": "yes", "p103": "partly", "p104": "no", "p201": "no", "p202": "no"}
    assert len(server.log()) == 2
    output = capfd.readouterr().out
    for row in ("negatives +6", "requests to make +2", "negatives made positives +1", "answer in part +1"):
        assert re.search(f"{row}\n", output), row
    assert f"a negative that answers\n  query:   {query(1)}\n  passage: {text(102, 'answer 1.')}\n" in output


def test_only_the_doubtful_are_asked_about(llm, tmp_path):
    server = llm()
    lines = [line(1, "no", "yes", "yes", "no", scores=[0.75, 0.71, 0.69, 0.9]), line(2, "yes", scores=[0.1])]
    main(arguments(server, train_file(tmp_path, lines), tmp_path))
    assert asked(server) == {("q1", "101"): 1, ("q1", "102"): 1, ("q1", "104"): 1}
    # A wider margin asks about those alone that are new; all, about all others.
    main(arguments(server, tmp_path / "train.jsonl", tmp_path, margin=0.3, overwrite="true"))
    assert asked(server).keys() - {("q1", "101"), ("q1", "102"), ("q1", "104")} == {("q1", "103")}
    main(arguments(server, tmp_path / "train.jsonl", tmp_path, ask="all", overwrite="true"))
    assert asked(server).total() == 5


def test_a_share_takes_the_highest_scores_whatever_the_positives(llm, tmp_path):
    server = llm()
    lines = [line(1, "no", "yes", scores=[0.75, 0.6]), line(2, "no", "no", scores=[0.7, 0.5]) | {"pos_scores": [9]}]
    pair = {name: line(3)[name] for name in ("query", "pos")}
    path = train_file(tmp_path, [*lines, pair])
    main(arguments(server, path, tmp_path, share=0.5))
    assert asked(server).keys() == {("q1", "101"), ("q2", "201")}
    main(arguments(server, path, tmp_path, share=0, overwrite="true"))
    assert asked(server).total() == 2
    main(arguments(server, path, tmp_path, share=1, overwrite="true"))
    assert asked(server).total() == 4
    # Of positives the lowest scores, and those of lines without negatives.
    main(arguments(server, path, tmp_path, share=0.5, positives="true", overwrite="true"))
    assert asked(server).keys() >= {("q1", "100"), ("q3", "300")}
    assert ("q2", "200") not in asked(server)


def test_of_several_positives_the_lowest_score_counts(llm, tmp_path):
    server = llm()
    record = line(1, "no", "no", scores=[0.75, 0.35])
    record |= {"pos": [*record["pos"], text(99, "answer 1.")], "pos_scores": [0.8, 0.4], "pos_ids": ["p100", "p99"]}
    main(arguments(server, train_file(tmp_path, [record]), tmp_path))
    assert len(asked(server)) == 2


def test_a_known_positive_among_the_negatives_is_dropped_unasked(llm, tmp_path):
    """Also where it is positive in another line, and written otherwise."""
    server = llm()
    first, other = line(1, "no", "no"), line(1, "no")
    other["neg"] = [text(100, "answer 1.").replace(" ", "\n").upper()]
    first["neg"][0] = first["pos"][0]
    main(arguments(server, train_file(tmp_path, [first, other, line(2, "no")]), tmp_path))
    found, _ = results(tmp_path)
    assert [record["neg"] for record in found] == [[text(102)], [], [text(201)]]
    assert asked(server).keys() == {("q1", "102"), ("q2", "201")}


def test_a_passage_in_several_lines_of_a_query_is_judged_once(llm, tmp_path):
    server = llm()
    twin = line(1, "yes", "no")
    twin["neg"] = [passage.replace(" ", "  ") for passage in twin["neg"]]
    main(arguments(server, train_file(tmp_path, [line(1, "yes", "no"), twin]), tmp_path))
    assert set(asked(server).values()) == {1}
    found, _ = results(tmp_path)
    assert [len(record["pos"]) for record in found] == [2, 2]


def test_what_answers_can_be_dropped(llm, tmp_path):
    lines = [line(1, "no", "yes", "partly")]
    main(arguments(llm(), train_file(tmp_path, lines), tmp_path, answering="drop"))
    (found,), _ = results(tmp_path)
    assert (found["pos"], found["neg"]) == (lines[0]["pos"], [text(101)])


def test_positives_are_judged_where_asked_for(llm, tmp_path):
    server = llm()
    wrong = line(1, "no", "yes") | {"pos": [text(100)]}
    far = line(2, "no", scores=[0.5]) | {"pos": [text(200)]}
    alone = line(3, "no") | {"pos": [text(300)]}
    main(arguments(server, train_file(tmp_path, [wrong, far, alone]), tmp_path, positives="true"))
    found, verdicts = results(tmp_path)
    assert verdicts["p100"] == "no"
    assert "p200" not in verdicts  # far above its negative
    assert [record["pos"] for record in found] == [[text(102, "answer 1.")], [text(200)]]
    assert found[0]["pos_ids"] == ["p102"]


def test_a_line_without_negatives_stays_as_a_pair(llm, tmp_path):
    pair = {"query": query(3), "pos": [text(300)]}
    main(arguments(llm(), train_file(tmp_path, [line(1, "yes", "partly"), line(2, "no"), pair]), tmp_path))
    found, _ = results(tmp_path)
    assert not [fault for record in found for fault in find_faults(record)]
    assert (len(found[0]["pos"]), found[0]["neg"], found[0]["neg_q"]) == (2, [], [])
    assert found[1:] == [line(2, "no"), pair]


def test_the_output_is_no_input(tmp_path, capfd):
    path = train_file(tmp_path, [line(1, "no")])
    argv = arguments(None, path, tmp_path, base_url="http://127.0.0.1:9/v1", overwrite="true")
    before = path.read_bytes()
    assert str(path) in refused(capfd, [*argv, f"--output={path}"], main)
    assert path.read_bytes() == before


def test_a_list_of_the_positives_alone_goes_when_there_are_new_ones(llm, tmp_path):
    record = line(1, "yes", "no")
    del record["neg_ids"]
    other = line(2, "no")
    del other["neg_ids"]
    main(arguments(llm(), train_file(tmp_path, [record, other]), tmp_path))
    found, _ = results(tmp_path)
    assert "pos_ids" not in found[0]
    assert found[0]["pos_scores"] == [0.8, 0.75]
    assert found[1] == other


def test_passages_are_shown_in_parts_and_in_an_order_of_the_seed(llm, tmp_path):
    path = train_file(tmp_path, [line(1, *["no"] * 10)])
    orders = []
    for seed in (1, 1, 2):
        server = llm()
        (tmp_path / "out.journal.jsonl").unlink(missing_ok=True)
        options = {"passages_per_question": 4, "seed": seed, "concurrency": 1, "overwrite": "true"}
        main(arguments(server, path, tmp_path, **options))
        shown = [re.findall(r"^passage (\d+)", e["request"]["messages"][0]["content"], re.M) for e in server.log()]
        assert list(map(len, shown)) == [4, 4, 2]
        orders.append([number for numbers in shown for number in numbers])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) != orders[0]


def test_verdicts_do_not_depend_on_the_order(llm, tmp_path):
    """The numbers of an answer are those that the passages were shown with."""
    whats = ["no", "yes", "partly", "no", "yes", "no", "partly", "yes", "no"]
    expected = {f"p{101 + place}": what for place, what in enumerate(whats)}
    for size in (1, 2, 9):
        (tmp_path / "out.journal.jsonl").unlink(missing_ok=True)
        path = train_file(tmp_path, [line(1, *whats)])
        main(arguments(llm(), path, tmp_path, passages_per_question=size, overwrite="true"))
        assert results(tmp_path)[1] == expected


@pytest.mark.parametrize("refusal", ["no schema…", None])
def test_a_server_without_schemas_is_asked_without(llm, tmp_path, refusal):
    server = llm({"all": [refusal]} if refusal else None)
    lines = [line(number, "yes", "no", "partly") for number in range(1, 21)]
    main(arguments(server, train_file(tmp_path, lines), tmp_path, concurrency=4))
    found, verdicts = results(tmp_path)
    assert Counter(verdicts.values()) == {"yes": 20, "no": 20, "partly": 20}
    assert false_negatives(found) == 0
    assert set(asked(server, "good").values()) == {1}
    refused_ones = server.log("400")
    assert all("response_format" in entry["request"] for entry in refused_ones)
    if refusal:
        assert 1 <= len(refused_ones) <= 4  # those that were under way
        assert not any("response_format" in entry["request"] for entry in server.log("good"))
    else:
        assert all("response_format" in entry["request"] for entry in server.log())


def test_a_form_of_answer_that_the_user_names_is_left_alone(llm, tmp_path):
    server = llm()
    options = {"request_options": '{"response_format": {"type": "json_object"}, "seed": 1}'}
    with pytest.raises(SystemExit):  # of the helper's server, which reads the schema
        main(arguments(server, train_file(tmp_path, [line(1, "no")]), tmp_path, max_retries=0, **options))
    assert server.log()[0]["request"]["response_format"] == {"type": "json_object"}


def test_answers_without_a_verdict_are_asked_for_once_more_and_then_the_passages_are_kept(llm, tmp_path, capfd):
    bad = ["empty", "wrong language", "malformed", "no choices", "contradiction"]
    plan = {f"q{1 + i}": [what] for i, what in enumerate(bad)}
    plan |= {f"q{11 + i}": [what] * 2 for i, what in enumerate(bad)}
    plan |= {"q20": ["first only"], "q21": ["empty", "500…"], "q22": ["400…"]}
    server = llm(plan)
    numbers = [*range(1, 6), *range(11, 16), 20, 21, 22]
    lines = [line(number, "yes", "no") for number in numbers]
    path = train_file(tmp_path, lines)
    main(arguments(server, path, tmp_path, max_retries=0))
    found, verdicts = results(tmp_path)
    by_query = {record["query"]: record for record in found}
    for number, before in zip(numbers, lines):
        judged = number in (*range(1, 6), 20)
        assert len(by_query[query(number)]["pos"]) == 1 + judged
        if judged:
            assert verdicts[f"p{100 * number + 1}"] == "yes"
        else:
            assert by_query[query(number)] == before
            assert verdicts[f"p{100 * number + 1}"] is None
    counts = asked(server)
    # Of a question with one verdict, the other passage alone is asked about again.
    assert sorted(counts["q20", str(n)] for n in (2001, 2002)) == [1, 2]
    assert {counts[f"q{n}", f"{n}01"] for n in (*range(1, 6), *range(11, 16))} == {2}
    output = capfd.readouterr().out
    assert re.search(r"passages without a verdict, kept where they were +14\n", output)
    assert re.search(r"  reply not readable +4\n", output)
    assert "2 questions had no answer: the same command with overwrite set asks these again" in output
    reasons = {i: v["reason"] for v in json_lines(tmp_path / "out.verdicts.jsonl") if "reason" in v for i in v["ids"]}
    assert reasons["p2101"].startswith("HTTP 500")
    assert reasons["p2201"].startswith("HTTP 400")
    assert reasons["p1101"] == "no verdict in the answer"
    # What was paid for is not asked a third time.
    main(arguments(server, path, tmp_path, max_retries=0, overwrite="true"))
    again = asked(server) - counts
    assert again.keys() == {("q21", "2101"), ("q21", "2102"), ("q22", "2201"), ("q22", "2202")}


def test_no_verdict_at_all_is_a_message(llm, tmp_path, capfd):
    argv = arguments(llm({"all": ["empty…"]}), train_file(tmp_path, [line(1, "no")]), tmp_path)
    assert "not one passage was judged, mostly: no verdict in the answer" in refused(capfd, argv, main)
    assert not (tmp_path / "out.jsonl").exists()


def test_queries_are_written_in_the_same_pass(llm, tmp_path):
    lines = [line(1, "no", "no", "yes", "no"), line(2, "no")]
    lines[1]["neg_q"] = None
    main(arguments(llm(), train_file(tmp_path, lines), tmp_path, write_queries="true"))
    found, _ = results(tmp_path)
    assert found[0]["neg_q"] == [["물음 101"], good(102), good(104)]
    assert found[1]["neg_q"] == [good(201)]


def test_dry_run_asks_and_writes_nothing(tmp_path, capfd):
    path = train_file(tmp_path, [line(n, "no", "yes", scores=[0.75, 0.1]) for n in range(1, 11)])
    main(arguments(None, path, tmp_path, base_url="http://127.0.0.1:9/v1", dry_run="true"))
    output = capfd.readouterr().out
    for row in ("negatives +20", "of these doubtful +10", "requests to make +10"):
        assert re.search(f"{row}\n", output), row
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_job_writes_the_same_again_without_a_request(llm, tmp_path, capfd):
    server = llm({"q1": ["empty", "empty"]})
    argv = arguments(server, train_file(tmp_path, [line(n, "no", "yes") for n in range(1, 7)]), tmp_path)
    main(argv)
    before = results(tmp_path)
    assert "set overwrite" in refused(capfd, argv, main)
    server.process.kill()
    main([*argv, "--overwrite=true"])
    assert results(tmp_path) == before
    assert len(server.log()) == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"margin": -1}, "--margin: found -1"),
        ({"passages_per_question": 0}, "--passages_per_question: found 0"),
        ({"ask": "some"}, "--ask: "),
        ({"answering": "keep"}, "--answering: "),
        ({"score_revision": "x"}, "--score_revision: goes with score_model, which is not set"),
        ({"score_model": ".", "ask": "all"}, "--score_model: goes with ask doubtful, not with all"),
        ({"score_model": "no/where"}, "no/where: neither a folder here nor a model"),
        ({"request_options": '{"api_key": "x"}'}, "the key belongs in the environment"),
        ({"timeout": 0}, "--timeout"),
        ({"language": "../x"}, "language"),
        ({"output": "/"}, "--output: found '/'"),
        ({"backend": "transformers"}, "--base_url: goes with backend server, not with transformers"),
        ({"ask": "all", "margin": 0.3}, "--margin: goes with ask doubtful, not with all"),
        ({"ask": "all", "share": 0.3}, "--share: goes with ask doubtful, not with all"),
        ({"margin": 0.2, "share": 0.3}, "--share: takes the place of margin"),
        ({"share": 2}, "--share: found 2.0, expected at most 1"),
        ({"max_query_chars": 100}, "--max_query_chars: goes with write_queries, which is not set"),
        ({"score_model": ".", "quantize": "int8"}, "--quantize: goes with a search, and here is none"),
        ({"pooling": "mean"}, "--pooling: goes with score_model, which is not set"),
        ({"trust_remote_code": True}, "--trust_remote_code: goes with score_model, which is not set"),
    ],
)
def test_mistakes_end_in_a_message(tmp_path, capfd, options, words):
    options = {"base_url": "http://127.0.0.1:9/v1"} | options
    assert words in refused(capfd, arguments(None, train_file(tmp_path, [line(1, "no")]), tmp_path, **options), main)
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize("dry_run", ["true", "false"])
@pytest.mark.parametrize("ask", ["all", "doubtful"])
def test_pairs_have_nothing_to_judge_but_positives(llm, tmp_path, capfd, ask, dry_run):
    pairs = [{name: line(n)[name] for name in ("query", "pos")} for n in (1, 2)]
    path = train_file(tmp_path, pairs)
    options = {"ask": ask, "dry_run": dry_run}
    message = refused(capfd, arguments(None, path, tmp_path, base_url="http://127.0.0.1:9/v1", **options), main)
    assert "--train_data: found no negatives in its lines, so nothing can be judged" in message
    assert [found.name for found in tmp_path.iterdir()] == ["train.jsonl"]
    server = llm()
    main(arguments(server, path, tmp_path, positives="true", **options))
    assert len(server.log()) == (0 if dry_run == "true" else 2)


def test_lines_without_scores_are_told_of(tmp_path, capfd):
    record = line(1, "no")
    del record["neg_scores"]
    path = train_file(tmp_path, [line(2, "no"), record])
    message = refused(capfd, arguments(None, path, tmp_path, base_url="http://127.0.0.1:9/v1"), main)
    assert f"--score_model: needed, since {path}:2 has no neg_scores" in message


def test_faulty_lines_are_told_of(tmp_path, capfd):
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [line(1, "no"), {"query": "물음", "pos": "답", "neg": ["다른 글"]}])
    message = refused(capfd, arguments(None, path, tmp_path, base_url="http://127.0.0.1:9/v1"), main)
    assert f"{path}:2: field 'pos': found a string" in message


def test_called_from_python(llm, tmp_path, capfd):
    options = {"language": "ko", "model": "writer", "max_retries": 0, "timeout": 60.0, "base_url": llm().url}
    options |= {"train_data": [train_file(tmp_path, [line(n, "no", "yes") for n in range(1, 4)])]}
    options |= {"output": tmp_path / "out.jsonl"}
    planned = judge(**options, dry_run=True)
    assert isinstance(planned, Judged)
    assert (planned.plan["requests to make"], planned.counts, planned.paths) == (3, {}, [])
    done = judge(**options)
    assert done.plan == planned.plan
    assert done.counts["negatives made positives"] == 3
    assert done.examples[0].what == "a negative that answers"
    assert done.unanswered == 0
    assert [path.name for path in done.paths] == ["out.jsonl", "out.verdicts.jsonl"]
    assert validate(train_data=[str(done.paths[0])]).faults == 0
    assert capfd.readouterr().out == ""
    with pytest.raises(UserError, match="margin: found -1"):
        judge(**options, margin=-1)
