import base64
import json
import re
import socket
import time

import pytest

from clpl_moe.llm.backends import Answer
from clpl_moe.llm.server import Server, _read_reply
from clpl_moe.synthesize.__main__ import main
from clpl_moe.synthesize.job import fill, load_prompt
from clpl_moe.synthesize.options import SynthesizeArguments
from helpers.synthesis import arguments, good, refused, results, text, train_file

pytest.importorskip("openai")


KEY = "sk-Very5ecret-0123456789"


def test_the_request_holds_model_prompt_and_options(llm, tmp_path):
    server = llm()
    options = {"temperature": 0.5, "max_answer_tokens": 99, "request_options": '{"reasoning_effort": "low"}'}
    main(arguments(server, train_file(tmp_path, 1), tmp_path, queries_per_passage=3, **options))
    (entry,) = server.log()
    prompt = fill(load_prompt("ko"), text(0), 3)
    assert "검색 질문을 한국어로 3개" in prompt
    assert entry["request"] == {
        "model": "writer",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0.5,
        "max_tokens": 99,
        "reasoning_effort": "low",
    }


def test_errors_that_pass_are_tried_again_and_retry_after_is_waited_for(llm, tmp_path, capfd):
    plan = {
        "0": ["429"],
        "1": ["500"],
        "2": ["timeout"],
        "3": ["cut"],
        "4": ["cut in the middle"],
        "5": ["html", "503"],
    }
    server = llm(plan)
    main(arguments(server, train_file(tmp_path, 8), tmp_path, timeout=10))
    _, store, failures = results(tmp_path)
    assert store == {f"p{n}": good(n) for n in range(8)}
    assert not failures
    requests = {n: [e for e in server.log() if e["passage"] == str(n)] for n in range(8)}
    assert {n: [e["what"] for e in entries] for n, entries in requests.items()} == {
        n: [*plan.get(str(n), []), "good"] for n in range(8)
    }
    assert requests[0][1]["time"] - requests[0][0]["time"] >= 1
    # One that meets a connection as the server closes it is sent again, though the server saw nothing of it.
    assert 15 <= int(re.search(r"retries included +(\d+)\n", capfd.readouterr().out)[1]) <= 18


def test_requests_at_once_stay_within_the_limit(llm, tmp_path):
    server = llm({"all": ["meet…"]}, seconds=0.1)
    main(arguments(server, train_file(tmp_path, 12), tmp_path, concurrency=3))
    assert max(entry["at_once"] for entry in server.log()) == 3


def test_the_key_reaches_the_server_and_nothing_else(llm, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    plan = {"0": ["echo"], "1": ["500…"], "2": ["html…"], "3": ["400…"], "4": ["429 for long…"], "5": ["no choices…"]}
    plan["6"] = ["long 400…"]
    server = llm(plan)
    started = time.time()
    argv = arguments(server, train_file(tmp_path, 8), tmp_path, max_retries=1, api_key_env="MY_KEY")
    main(argv)
    assert time.time() - started < 300  # not the ten minutes that it was told to wait
    _, store, failures = results(tmp_path)
    assert store["p0"] == ["질문이 무엇인가요 Bearer [key] 0"]
    for passage in ("p1", "p3", "p4"):
        assert "your key is Bearer [key]" in failures[passage]
    rest = llm({"all": ["401…"]})
    message = refused(
        capfd, arguments(rest, train_file(tmp_path, 4, 20), tmp_path, api_key_env="MY_KEY", overwrite="true")
    )
    assert "HTTP 401: your key is Bearer [key]" in message
    captured = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "server" not in str(path.relative_to(tmp_path))]
    assert len(files) == 6
    for written in [captured.out, captured.err, message, *(path.read_text() for path in files)]:
        assert KEY[:12] not in written
    assert failures["p6"].endswith("xyour key is Bearer [key], prompt 6")
    assert KEY not in refused(capfd, [*argv[:-1], f"--api_key_env={KEY}", "--overwrite=true"])
    assert KEY not in refused(capfd, [*argv[:-1], f"--api_key={KEY}", "--overwrite=true"])
    assert KEY[:8] not in refused(capfd, [*argv, KEY])
    for fields in ({"api_key": KEY}, {"extra": [{"Authorization": f"Bearer {KEY}"}]}):
        message = refused(capfd, [*argv, "--request_options", json.dumps(fields)])
        assert "the key belongs in the environment" in message
        assert KEY[:8] not in message
    assert KEY[:8] not in refused(capfd, [*argv, "--request_options", f'{{"api_key": "{KEY}"'])


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"wrong key {KEY.upper()}!", "wrong key [key]!"),
        (f"wrong key {KEY[:9]}", "wrong key [key]"),
        (f"İİİİ {KEY}", "İİİİ [key]"),
        (f"wrong key {KEY[:8]}********{KEY[-6:]}", "wrong key [key]********[key]"),
        (f"no {base64.b64encode(KEY.encode()).decode()}", "no "),
        (f"no {base64.b64encode(f'user:{KEY}'.encode()).decode()}", "no dXNlc"),
        (f"no {base64.b64encode(f'me:{KEY}:x'.encode()).decode()}", "no bW"),
        ("a secret of 6789 letters", "a secret of 6789 letters"),
    ],
)
def test_messages_have_no_part_of_the_key(tmp_path, monkeypatch, said, shown):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    options = SynthesizeArguments("t.jsonl", str(tmp_path / "o.jsonl"), "ko", "m")
    hidden = Server(options)._hide(said)
    assert hidden.startswith(shown)
    assert not any(KEY[i : i + 6].lower() in hidden.lower() for i in range(len(KEY) - 5))
    assert ("[key]" in hidden) == (said != shown)
    assert len(hidden.replace("[key]", "")) < 30  # of base64, too, no more than ends are left


@pytest.mark.parametrize("status", ["401", "402", "404"])
def test_a_refusal_ends_the_job_and_keeps_the_answers(llm, tmp_path, capfd, status):
    server = llm({"5": [f"{status}…"]})
    argv = arguments(server, train_file(tmp_path, 12), tmp_path, concurrency=1)
    message = refused(capfd, argv)
    assert f"HTTP {status}" in message
    assert f"5 answers are in {tmp_path / 'out.journal.jsonl'}" in message
    assert not (tmp_path / "out.jsonl").exists()
    assert len(server.log()) == 6
    other = llm()
    main(arguments(other, train_file(tmp_path, 12), tmp_path))
    assert sorted(int(entry["passage"]) for entry in other.log()) == list(range(5, 12))
    assert len(results(tmp_path)[1]) == 12


def test_nobody_there_is_said_at_once(tmp_path, capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        started = time.time()
        # Nobody listens at a port that is taken, and nobody else takes it meanwhile.
        message = refused(capfd, arguments(None, train_file(tmp_path, 4), tmp_path, base_url=url, max_retries=20))
    assert f"no server at {url}" in message
    assert time.time() - started < 60  # twenty retries would take longer


def test_a_server_that_only_fails_ends_the_job(llm, tmp_path, capfd):
    server = llm({"all": ["500…"]})
    message = refused(capfd, arguments(server, train_file(tmp_path, 100), tmp_path, max_retries=0))
    assert "has not given an answer 16 times in a row, lastly: HTTP 500" in message
    assert len(server.log()) <= 16 + 8
    wrong = llm({"all": ["400…"]})
    message = refused(capfd, arguments(wrong, train_file(tmp_path, 100, first=100), tmp_path))
    assert "16 times in a row, lastly: HTTP 400" in message
    few = arguments(server, train_file(tmp_path, 3, first=300), tmp_path, max_retries=0)
    assert "not one passage was answered, mostly: HTTP 500" in refused(capfd, few)
    assert not (tmp_path / "out.jsonl").exists()


def test_no_key_for_the_public_server_is_a_message(tmp_path, capfd, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert "export OPENAI_API_KEY" in refused(capfd, arguments(None, train_file(tmp_path, 2), tmp_path))


def test_a_short_key_is_no_part_of_the_answers(llm, tmp_path, monkeypatch):
    """Servers without keys take any; x stands in many a word."""
    for key in ("x", "boxer"):
        monkeypatch.setenv("MY_KEY", key)
        server = llm({"0": ["boxer"]})
        main(arguments(server, train_file(tmp_path, 1), tmp_path, api_key_env="MY_KEY", overwrite="true"))
        assert results(tmp_path)[1] == {"p0": ["0번째 boxer는 누구인가요?"]}
        (tmp_path / "out.journal.jsonl").unlink()


def test_no_more_requests_at_once_than_there_are_passages(llm, tmp_path, monkeypatch):
    started = time.time()
    main(arguments(llm(), train_file(tmp_path, 11), tmp_path, concurrency=1_000_000_000))
    assert len(results(tmp_path)[1]) == 11
    assert time.time() - started < 120


def test_counts_of_tokens_that_no_journal_takes_are_not_counted():
    for counts in ((-1, 2), (True, 2), (1.5, 2), (None, 2), ("1", 2)):
        usage = dict(zip(("prompt_tokens", "completion_tokens"), counts))
        reply = json.dumps({"choices": [{"message": {"content": "a"}}], "usage": usage})
        assert _read_reply(reply, str) == Answer("a", False, 0, 2)
