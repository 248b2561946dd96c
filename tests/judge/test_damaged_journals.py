import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clpl_moe.judge.__main__ import main
from helpers.damage import contents, damaged, ends_well
from helpers.judging import line, train_file
from helpers.synthesis import Llm, arguments

pytest.importorskip("openai")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Server, training data, and the journal of a finished job."""
    folder = tmp_path_factory.mktemp("job")
    server = Llm(folder / "server", {"q2": ["empty…"]}, 0)
    train = train_file(folder, [line(n, "yes", "no", "partly") for n in range(1, 6)])
    main(arguments(server, train, folder))
    yield server, train, (folder / "out.journal.jsonl").read_bytes()
    server.process.kill()
    server.process.wait()


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_journal_is_gone_on_from_or_told_of(job, data):
    server, train, whole = job
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "out.journal.jsonl").write_bytes(data.draw(damaged(whole)))
        before = contents(folder)
        code = ends_well(main, arguments(server, train, folder, max_retries=0))
        if code == 2:
            assert contents(folder) == before
            return
        assert sorted(contents(folder)) == ["out.journal.jsonl", "out.jsonl", "out.verdicts.jsonl"]
