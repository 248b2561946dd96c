"""How a mistake of the user's reaches them: one message, exit code 2, no traceback."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn


class UserError(Exception):
    """Something the user can mend: a bad line, a missing file, an unknown key, a folder in the way.

    The message names the place (file, line, field), what was found and what was expected.
    """


class OptionError(UserError):
    """A wrong value of an option, in Python of the argument of that name: what was found and what was expected."""

    def __init__(self, option: str, fault: str) -> None:
        super().__init__(f"{option}: {fault}")
        self.option, self.fault = option, fault


class Stopped(Exception):
    """A signal ended a job, which left things in order.

    Args:
        message: what was done, and how the job goes on; empty where another process says it.
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def at(path: str | Path, line: int | None = None, field: str | None = None) -> str:
    """The place of a fault, as every message begins with it: ``file:line: field 'x'``."""
    place = str(path) if line is None else f"{path}:{line}"
    return place if field is None else f"{place}: field '{field}'"


def no_such(kind: Literal["file", "folder"], path: str | Path) -> str:
    """What to say of a path where a file, or a folder, is expected and is none."""
    other = Path(path).is_dir() if kind == "file" else Path(path).is_file()
    found = "folder" if kind == "file" else "file"
    return f"found a {found}, expected a {kind}" if other else f"no such {kind}"


def type_name(value: object) -> str:
    """What was found, in the words of JSON where Python's would puzzle."""
    return "null" if value is None else type(value).__name__


def shorten(text: str, most: int) -> str:
    """A text of at most ``most`` characters, for messages."""
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(error: Exception) -> str:
    """What an error of a library says, which may be some lines."""
    return shorten(" ".join(str(error).split()), 500)


# What the machine refuses, rather than a fault of the program: it is told as briefly.
_OF_THE_MACHINE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EBUSY, errno.EIO, errno.ESTALE, errno.ELOOP),
)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_LONG_WORD = re.compile(r"\S{1000,}")


def printable(text: str) -> str:
    """A text for a terminal: what it quotes can neither steer the terminal, nor begin a line, nor fill the screen."""
    text = _LONG_WORD.sub(lambda found: f"{found[0][:400]}...{found[0][-100:]}", text)
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text).replace("\n", "\n  ")


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command's ``main``: a :class:`UserError`, and a disk that is full or may not be written to, become one
    line on stderr and exit code 2. SIGTERM ends it with 143, after what is unfinished has been removed; Ctrl-C with 130."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs) -> None:
        terminates, hook, layout = _catch_signals(), sys.unraisablehook, warnings.formatwarning
        warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"  # no line of code
        sys.unraisablehook = functools.partial(_signal_again, hook)
        try:
            with _interruptions_first():
                main(*args, **kwargs)
                sys.stdout.flush()
        except UserError as error:
            dashes = "--" if isinstance(error, OptionError) else ""
            print(f"error: {dashes}{printable(str(error))}", file=sys.stderr)
            sys.exit(2)
        except BrokenPipeError:  # the reader of the output, such as `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            if error.errno not in _OF_THE_MACHINE:
                raise
            named = error.filename2 or error.filename  # of a copy, where it was to go
            place = f"{os.fsdecode(named)}: " if isinstance(named, str | bytes | os.PathLike) else ""
            print(f"error: {printable(place)}{error.strerror}", file=sys.stderr)
            sys.exit(2)
        except Stopped as stopped:
            if str(stopped):
                print(stopped, file=sys.stderr)
            sys.exit(stopped.exit_code)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        finally:
            sys.unraisablehook, warnings.formatwarning = hook, layout
            if terminates:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return wrapper


@contextlib.contextmanager
def _interruptions_first() -> Iterator[None]:
    """Where an interruption has brought about another error, as in torch's context managers, raise the interruption."""
    try:
        yield
    except Exception as error:
        behind = error.__context__
        while behind is not None:
            if isinstance(behind, KeyboardInterrupt) or getattr(behind, "code", None) == 128 + signal.SIGTERM:
                raise behind from None
            behind = behind.__context__
        raise


def _catch_signals() -> bool:
    """Let signals raise exceptions where they would end the process; returns whether SIGTERM was one of them."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see clpl_moe/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Of several processes, one that waits for the others would not come to raise anything.
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL or os.environ.get("WORLD_SIZE", "1") != "1":
        return False
    signal.signal(signal.SIGTERM, _terminate)
    return True


def _signal_again(hook: Callable[[Any], object], unraisable: Any) -> None:
    """An interruption that came while Python removed an object, and was lost with that: send it again."""
    interrupted = issubclass(unraisable.exc_type, KeyboardInterrupt)
    if interrupted or getattr(unraisable.exc_value, "code", None) == 128 + signal.SIGTERM:
        number = signal.SIGINT if interrupted else signal.SIGTERM
        if not interrupted:  # the first one has left the default, which ends the process with all that is unfinished
            signal.signal(number, functools.partial(_terminate, told=True))
        while True:
            try:
                threading.Timer(0.01, os.kill, (os.getpid(), number)).start()  # not while this function runs
                break
            except KeyboardInterrupt:  # it did run longer, on a busy machine
                continue
    else:
        hook(unraisable)


def _terminate(number: int, frame: object, told: bool = False) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    if not told:
        os.write(2, b"terminated\n")
    raise SystemExit(128 + number)
