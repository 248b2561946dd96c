import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from clpl_moe.__main__ import VERBS
from clpl_moe.common.errors import Stopped, UserError, command
from clpl_moe.common.files import atomic_open

# Ctrl-C as a module is looked for: from then on the command's own modules are loaded.
SITE = """
import os, signal, sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_while_modules_load_is_no_traceback(tmp_path, verb):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "INTERRUPTED_AT": f"clpl_moe.{verb}"}
    command = [sys.executable, "-m", f"clpl_moe.{verb}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in done.stderr


def test_the_package_leaves_ctrl_c_to_the_programs_that_use_it():
    code = "import signal, clpl_moe; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sigterm_ends_a_command_that_leaves_nothing_unfinished(tmp_path, capfd):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    @command
    def main():
        with atomic_open(tmp_path / "file") as file:
            file.write("half")
            os.kill(os.getpid(), signal.SIGTERM)
            file.write("whole")

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 143
    assert capfd.readouterr().err == "terminated\n"
    assert list(tmp_path.iterdir()) == []
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_that_brings_about_another_error_is_no_mistake_of_the_user(capfd, number, code):
    @command
    def main():
        try:
            try:
                os.kill(os.getpid(), number)
                time.sleep(1)
            finally:
                raise RuntimeError("trying to pop from empty mode stack")
        except Exception as error:
            raise UserError(f"the encoder cannot be loaded: {error}") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == code
    assert "error" not in capfd.readouterr().err


def test_a_job_that_stopped_in_order_says_how_it_goes_on(capsys):
    @command
    def main():
        raise Stopped("saved, goes on by ...", signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 143
    assert capsys.readouterr().err == "saved, goes on by ...\n"


def test_what_a_message_quotes_does_not_steer_the_terminal(capsys):
    @command
    def main():
        raise UserError("found '\x1b[2Jx\x1e\x85\u2028\r'")

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "error: found '\\x1b[2Jx\\x1e\\x85\\u2028\\r'\n"


def test_a_message_is_one_whatever_it_quotes(capsys):
    """What an option or a file holds neither begins a line nor fills the screen."""

    @command
    def main(error):
        raise error

    for error in (UserError(f"a{'x' * 5000}b: no such file\nerror: x"), OSError(errno.ENAMETOOLONG, "!", "x" * 5000)):
        with pytest.raises(SystemExit):
            main(error)
        first, *rest = capsys.readouterr().err.splitlines()
        assert len(first) < 600
        assert all(line.startswith("  ") for line in rest)


@pytest.mark.parametrize("busy", [False, True])
def test_ctrl_c_is_not_lost_while_python_removes_an_object(capfd, monkeypatch, busy):
    """There an exception is printed and forgotten; and so it is where what sends it again has not ended yet."""
    start, waited = threading.Timer.start, []

    def start_slowly(timer):
        start(timer)
        if busy and not waited:
            waited.append(True)
            time.sleep(5)

    class Slow:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass

    @command
    def main():
        Slow()
        time.sleep(20)

    monkeypatch.setattr(threading.Timer, "start", start_slowly)
    started = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert capfd.readouterr().err == "interrupted\n"
    assert time.monotonic() - started < 10


def test_sigterm_is_not_lost_while_python_removes_an_object():
    """It comes again, and what is unfinished is put in order then."""
    code = """if True:
        import os, signal, time
        from clpl_moe.common.errors import command

        class Slow:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                for _ in range(1000):
                    pass

        @command
        def main():
            try:
                Slow()
                time.sleep(60)
            finally:
                print("in order")

        main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "in order\n", "terminated\n")


def test_a_command_shows_a_warning_without_the_line_of_code():
    code = (
        "import warnings; from clpl_moe.common.errors import command; command(lambda: warnings.warn('a\\x1b thing'))()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "warning: a\\x1b thing\n"
