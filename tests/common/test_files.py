import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clpl_moe.common.errors import UserError, command
from clpl_moe.common.files import (
    atomic_open,
    naming_a_full_disk,
    read_jsonl,
    refuse_existing,
    refuse_unwritable,
    resolved,
    write_json,
)
from clpl_moe.common.output import atomic_dir, writing
from clpl_moe.prepare.sources.squad import read_squad


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
        (b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"id": 1, "text": 2, "id": 3}', "'id' stands twice"),
        (b'{"id": "\x00"}', "Invalid control character"),
    ],
    ids=["digits", "deep", "twice", "control"],
)
def test_json_that_python_or_we_do_not_take(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + line)
    with pytest.raises(UserError, match=message) as error:
        list(read_jsonl(path))
    assert str(error.value).startswith(f"{path}:2: not JSON")


def test_squad_with_a_number_of_thousands_of_digits(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"version": ' + "9" * 5000 + ', "data": []}')
    with pytest.raises(UserError, match=r"a.json: not JSON \(a number of thousands of digits\)"):
        read_squad(path)


@pytest.mark.parametrize("text", [b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n', b'\n{"a": 1}\n{"a": 2}'])
def test_what_editors_add(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text)
    assert [record["a"] for _, record in read_jsonl(path)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": "ᄒ"}'.encode("utf-16"), r"a.jsonl: not UTF-8 text, but UTF-16, .* iconv -f UTF-16 -t UTF-8"),
        ('{"a": "한"}'.encode("cp949"), r"a.jsonl:1: not UTF-8 text"),
        (b"\x1f\x8b\x08\x00", r"a.jsonl:1: not UTF-8 text"),
    ],
    ids=["utf-16", "cp949", "gzip"],
)
def test_other_encodings(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_jsonl(path))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("{}")

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a.jsonl: cannot be read \(Permission denied\)"):
        list(read_jsonl(path))


def test_outputs_that_cannot_be_written_are_refused_beforehand(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written, .*file is not a folder"):
        refuse_unwritable(tmp_path / "file" / "a" / "b.jsonl")
    refuse_unwritable(tmp_path / "new" / "folders" / "b.jsonl")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written, the folder .* is read-only"):
        refuse_existing(tmp_path / "b.jsonl")


def test_names_that_are_too_long_are_refused_beforehand(tmp_path):
    for name in ("x" * 300, "x" * 250, "가" * 100):
        with pytest.raises(UserError, match=r"cannot be written \(File name too long\)"):
            refuse_unwritable(tmp_path / "new" / name)
    refuse_unwritable(tmp_path / "new" / ("x" * 200) / ("x" * 200))


def test_a_link_to_nothing_is_in_the_way(tmp_path):
    for name, to in (("nothing", tmp_path / "nowhere"), ("itself", tmp_path / "itself")):
        (tmp_path / name).symlink_to(to)
        with pytest.raises(UserError, match="the output is a link to nothing"):
            refuse_existing(tmp_path / name)
        refuse_existing(tmp_path / name, overwrite=True)


def test_a_link_within_itself_is_a_path_as_any(tmp_path):
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert resolved(tmp_path / "itself" / "a").name == "a"
    with pytest.raises(UserError, match="cannot be written"), writing(tmp_path / "itself", inside=True):
        pass
    with pytest.raises(UserError, match="cannot be written"), writing(tmp_path / "itself" / "a.jsonl"):
        pass


def test_overwrite_replaces_outputs_of_its_kind_only(tmp_path):
    """With --output ~ --overwrite true nobody means to delete it."""
    (tmp_path / "thesis.tex").write_text("")
    names = ("corpus.jsonl", "*_queries.jsonl")
    for files in (names, ()):
        with pytest.raises(UserError, match="found a folder with other things"):
            refuse_existing(tmp_path, True, files=files)
    for name in ("corpus.jsonl", "dev_queries.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"thesis.tex: not written by this command"):
        refuse_existing(tmp_path, True, files=names)
    with pytest.raises(UserError, match="found a file, expected a folder with corpus.jsonl to replace"):
        refuse_existing(tmp_path / "thesis.tex", True, files=names)
    (tmp_path / "thesis.tex").unlink()
    refuse_existing(tmp_path, True, files=names)
    (tmp_path / "empty").mkdir()
    refuse_existing(tmp_path / "empty", files=names)


def test_what_the_machine_refuses_is_one_line(capsys):
    @command
    def main(error):
        raise error

    with pytest.raises(SystemExit) as stop:
        main(OSError(errno.ENOSPC, "No space left on device", "x.jsonl"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: x.jsonl: No space left on device\n"
    with pytest.raises(OSError, match="odd"):  # a fault of ours keeps its traceback
        main(OSError(errno.EINVAL, "odd"))


@pytest.mark.parametrize("make", [atomic_open, atomic_dir])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path, make):
    path = tmp_path / "output"
    path.write_text("before")

    def fail():
        with make(path) as output:
            if make is atomic_dir:
                (output / "a").write_text("half")
            else:
                output.write("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["output"]
    assert path.read_text() == "before"


UNFINISHED = """
import sys, time
from clpl_moe.common.files import atomic_open

with atomic_open(sys.argv[1]) as file:
    print("ready", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_was_writing_goes_when_the_file_is_written_again(tmp_path):
    path = tmp_path / "out.json"
    own = {".out.json.tmp", ".out.json.backup_1.tmp.txt", ".other.json.abcdefgh.tmp"}
    for name in own:
        (tmp_path / name).write_text("the user's")
    command = [sys.executable, "-c", UNFINISHED, str(path)]
    killed, living = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2))
    for process in (killed, living):
        assert process.stdout.readline() == "ready\n"
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.iterdir())) == 5
    write_json(path, [])
    unfinished = {file.name for file in tmp_path.iterdir()} - own - {"out.json"}
    assert len(unfinished) == 1
    living.kill()
    living.communicate()
    write_json(path, [])
    assert {file.name for file in tmp_path.iterdir()} == own | {"out.json"}


def test_a_full_disk_is_told_with_the_place(tmp_path, monkeypatch, capsys):
    """torch, numpy and safetensors have words and classes of their own."""
    path = tmp_path / "weights"

    @command
    def main(error):
        with naming_a_full_disk(path):
            raise error

    full = f"error: {path}: No space left on device\n"
    with pytest.raises(RuntimeError, match="odd"):
        main(RuntimeError("odd"))
    monkeypatch.setattr("shutil.disk_usage", lambda there: shutil._ntuple_diskusage(100, 100, 0))
    for error in (RuntimeError("PytorchStreamWriter failed"), OSError("16 requested and 8 written")):
        with pytest.raises(SystemExit):
            main(error)
        assert capsys.readouterr().err == full
    with pytest.raises(SystemExit):
        main(OSError(errno.ENOSPC, "No space left on device"))
    assert capsys.readouterr().err == full
    with pytest.raises(SystemExit):  # of a copy, where it was to go
        main(OSError(errno.ENOSPC, "No space left on device", "module.py", None, str(path)))
    assert capsys.readouterr().err == full
    with pytest.raises(SystemExit):
        main(UserError("odd"))
    assert capsys.readouterr().err == "error: odd\n"


def test_a_write_without_room_names_the_file(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no such device")
    path = tmp_path / "x.json"

    def fill():
        with atomic_open(path) as file, Path("/dev/full").open("w") as full:
            os.dup2(full.fileno(), file.fileno())
            file.write("x" * 100_000)

    with pytest.raises(OSError, match="No space left") as error:
        fill()
    assert error.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
