import sys

import pytest

from clpl_moe.ablate.work import CommandError, Workshop


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
    with pytest.raises(CommandError, match="code 1: it said nothing"):
        Workshop(1).call("train", {}, tmp_path)


def test_cores_are_shared_between_runs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert [Workshop(parallel).threads for parallel in (1, 2, 4, 9)] == [6, 3, 1, 1]
