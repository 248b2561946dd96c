import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clpl_moe.common.files import write_json
from clpl_moe.synthesize.__main__ import main
from helpers.damage import contents, damaged, ends_well
from helpers.synthesis import Llm, arguments, train_file

pytest.importorskip("openai")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Arguments and journal of a finished job, and its server."""
    folder = tmp_path_factory.mktemp("job")
    server = Llm(folder / "server", {"2": ["empty…"]}, 0)
    train_file(folder, 8)
    main(arguments(server, folder / "train0.jsonl", folder))
    yield server, folder / "train0.jsonl", (folder / "out.journal.jsonl").read_bytes()
    server.process.kill()
    server.process.wait()


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_journal_is_gone_on_from_or_told_of(job, data):
    server, train, whole = job
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        journal = folder / "out.journal.jsonl"
        journal.write_bytes(data.draw(damaged(whole)))
        before = contents(folder)
        code = ends_well(main, arguments(server, train, folder, max_retries=0))
        if code == 2:
            assert contents(folder) == before
            return
        names = ["out.failures.jsonl", "out.journal.jsonl", "out.jsonl", "out.positive_queries.jsonl"]
        assert sorted(contents(folder)) == names


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_prompt_file_is_used_or_told_of(job, data):
    server, train, _ = job
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "prompts.yaml", {"ko": "{queries} {passage}", "generic": "{passage}"})
        one_line = (folder / "prompts.yaml").read_bytes().replace(b"\n", b"") + b"\n"
        (folder / "prompts.yaml").write_bytes(data.draw(damaged(one_line)))
        before = contents(folder)
        argv = arguments(server, train, folder, max_retries=0, prompts=folder / "prompts.yaml", dry_run=True)
        ends_well(main, argv)
        assert contents(folder) == before
