import sys

import pytest

from clpl_moe.ablate.work import CommandError, Workshop, locked
from clpl_moe.common.errors import UserError


def test_a_failed_job_is_reported_and_the_rest_goes_on():
    def work(job):
        if job == "b":
            raise CommandError("out of luck")
        done.append(job)
        return "well"

    done = []
    assert Workshop(2).run_all(["a", "b", "c"], work, "jobs") == {"b": "out of luck"}
    assert sorted(done) == ["a", "c"]


def test_the_reason_of_a_failure_is_none_of_an_earlier_one(tmp_path, monkeypatch):
    (tmp_path / "log.txt").write_text("error: of an earlier time\n")
    monkeypatch.setattr(sys, "executable", "false")
    with (tmp_path / "lock").open("w") as lock, pytest.raises(CommandError, match="code 1: it said nothing"):
        Workshop(1).call("train", {}, tmp_path, lock.fileno())


def test_cores_are_shared_between_runs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert [Workshop(parallel).threads for parallel in (1, 2, 4, 9)] == [6, 3, 1, 1]


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    other = locked(tmp_path / "run")
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process works in this folder"):
        other.__enter__()
    with locked(tmp_path / "run"):
        pass
