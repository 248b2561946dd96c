import os
import platform

from clpl_moe.common.machine import cpu_field, machine, usable_cores, without_folders


def test_usable_cores_where_there_are_no_limits(monkeypatch):
    assert 1 <= usable_cores() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == os.cpu_count()


def test_the_processor_is_what_linux_calls_it(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr("clpl_moe.common.machine.Path", lambda _: cpuinfo)
    assert cpu_field("vendor_id") is None
    assert machine()["processor"] == platform.processor()
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD X: 1\n\nmodel name\t: other\n")
    assert cpu_field("vendor_id") == "AuthenticAMD"
    assert machine()["processor"] == "AMD X: 1"


def test_a_command_line_tells_nothing_of_absolute_folders():
    words = ["--run", "/home/me/runs/ko", "--output=/home/me/x.json", "runs/ko", "--max_steps", "4", "/x/", "/"]
    assert without_folders(words) == ["--run", "ko", "--output=x.json", "runs/ko", "--max_steps", "4", "x/", "/"]
