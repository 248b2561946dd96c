"""A named pipe where a file is expected: opening one waits for who writes, for ever where nobody does."""

import contextlib
import os
import signal

import pytest

from clpl_moe.common.compressed import open_bytes
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import hash_file, read_json
from clpl_moe.convert import convert
from clpl_moe.data.formats import data_files
from clpl_moe.data.tables import arrow_rows, parquet_rows
from clpl_moe.evaluate.shared import _read_table
from clpl_moe.judge.job import JOURNAL
from clpl_moe.llm.journal import read_journal
from clpl_moe.report.card import card
from helpers.reports import make_data

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes in folders")


@contextlib.contextmanager
def without_waiting():
    def waits(*_):
        raise AssertionError("waits for a pipe")

    handler = signal.signal(signal.SIGALRM, waits)
    signal.setitimer(signal.ITIMER_REAL, 120)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def opened(path):
    with open_bytes(path):
        pass


@pytest.mark.parametrize(
    "use",
    [
        opened,
        hash_file,
        lambda path: read_json(path, dict),
        lambda path: parquet_rows(str(path), path.name),
        lambda path: arrow_rows(str(path), path.name),
        lambda path: list(_read_table(path)),
        lambda path: convert(train_data=[path], output=path.parent / "out.jsonl", to="jsonl"),
        lambda path: read_journal(path, JOURNAL, {}, overwrite=True),
        lambda path: data_files([str(path)])[0].digest(),  # of training
    ],
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_told(tmp_path, use, make):
    make(tmp_path / "other")
    with (
        without_waiting(),
        pytest.raises(UserError, match=r"other: (not a file|found another file|the folder holds no)"),
    ):
        use(tmp_path / "other")


@pytest.mark.parametrize("name", ["run/README.md", "after/ko/metrics.json"])
def test_a_pipe_in_the_place_of_a_card_or_of_results(tmp_path, name):
    place = make_data(tmp_path) / name
    place.unlink(missing_ok=True)
    os.mkfifo(place)
    with without_waiting(), pytest.raises(UserError, match="not (a file|the results)"):
        card(run=tmp_path / "run", after=tmp_path / "after")
