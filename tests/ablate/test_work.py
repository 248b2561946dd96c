import sys

import pytest

from clpl_moe.ablate.work import CommandError, Workshop, clear
from clpl_moe.common.output import WORK_FOLDER
from helpers.ablation import finish, plan


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


def test_a_finished_run_that_was_killed_at_its_end_leaves_no_weights(configuration):
    run = plan(configuration).runs[1]
    finish(run, 0.5)
    left = [run.folder / WORK_FOLDER / "lock", *(run.folder / "model" / name for name in ("a.safetensors", "b.json"))]
    left.append(run.folder / "model" / "checkpoint-1" / "c.pt")
    left.append(run.folder / "model" / "experts" / "d.safetensors")
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    clear(run, keep_model=True)
    assert [path.exists() for path in left] == [False, True, True, False, True]
    left[0].parent.mkdir()
    clear(run, keep_model=False)
    assert [path.exists() for path in left] == [False, False, True, False, False]
    left[1].touch()
    clear(run, keep_model=False)  # not one that was not killed
    assert left[1].exists()


def test_cores_are_shared_between_runs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert [Workshop(parallel).threads for parallel in (1, 2, 4, 9)] == [6, 3, 1, 1]
