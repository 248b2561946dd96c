import os

from clpl_moe.machine import usable_cores, without_folders


def test_usable_cores_where_there_are_no_limits(monkeypatch):
    assert 1 <= usable_cores() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == os.cpu_count()


def test_a_command_line_tells_nothing_of_absolute_folders():
    words = ["--run", "/home/me/runs/ko", "--output=/home/me/x.json", "runs/ko", "--max_steps", "4", "/x/", "/"]
    assert without_folders(words) == ["--run", "ko", "--output=x.json", "runs/ko", "--max_steps", "4", "x/", "/"]
