"""A process that has the heavy modules loaded and forks one process for each command: no command waits for their import.

:class:`Server` is the side of the caller. It starts ``python -m clpl_moe.ablate.server``, whose standard input is a socket. A
request is the length of a JSON object, the object, and two open files: the log and a pipe. The forked process writes its id to the pipe, then, when it is done, its exit code. The server initialises
no CUDA, which a forked process could not use, and ends when the caller closes the socket or dies.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import IO, Any

# All that training, mining and evaluation import, also late. What cannot be imported is left to the command, which says why.
PRELOADED = (
    *("clpl_moe.train.runner", "clpl_moe.mine.lines", "clpl_moe.evaluate.evaluation", "clpl_moe.train.card"),
    *("transformers.models.xlm_roberta.modeling_xlm_roberta", "transformers.models.bert.modeling_bert"),
    *("sentence_transformers", "ir_measures", "jinja2", "clpl_moe.moe.kernels"),
)
_LENGTH = struct.Struct("<I")


class ServerEnded(Exception):
    """The server is gone; ``code`` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the server of processes ended with code {code}")
        self.code = code


class Process:
    """A process forked by the server: ``status`` is the pipe's end, from which ``pid`` was read."""

    def __init__(self, pid: int, status: IO[str]) -> None:
        self.pid, self._status = pid, status

    def wait(self) -> int | None:
        """The exit code when the process has ended; None where it was killed."""
        with self._status:
            said = self._status.read()  # to the end, which comes when no process holds the pipe
        self.pid = 0
        return int(said) if said else None

    def terminate(self) -> None:
        """Ask the process to end."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


class Server:
    """Starts commands in processes that have the modules already; several threads may use it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._socket, other = socket.socketpair()
        argv = [sys.executable, "-m", "clpl_moe.ablate.server"]
        with other:
            self._server = subprocess.Popen(
                argv, stdin=other.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
            )
        self._sending = threading.Lock()

    def start(self, module: str, arguments: list[str], environment: dict[str, str], log: int) -> Process:
        """Start ``python -m module arguments`` with its output going to ``log``.

        Raises:
            ServerEnded: there is no server, any more or from the beginning.
        """
        request = {"module": module, "arguments": arguments, "environment": environment, "folder": str(Path.cwd())}
        content = json.dumps(request).encode()
        ours, theirs = os.pipe()
        status = os.fdopen(ours)
        try:
            with self._sending:
                socket.send_fds(self._socket, [_LENGTH.pack(len(content))], [log, theirs])
                self._socket.sendall(content)
        except OSError:
            status.close()
            raise ServerEnded(self.close()) from None
        finally:
            os.close(theirs)
        if not (pid := status.readline()):
            raise ServerEnded(self.close())
        return Process(int(pid), status)

    def close(self) -> int:
        """End the server and its commands; returns its exit code."""
        self._socket.close()
        return self._server.wait()


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each request. Returns its request in each child, and None in the server, when the caller is gone:
    nobody waits for the children any more, so they are told to end."""
    children: list[int] = []
    while True:
        header, files, _, _ = socket.recv_fds(requests, _LENGTH.size, 2)
        # Until it is waited for, no other process gets the id of one that has ended.
        children = [pid for pid in children if not os.waitpid(pid, os.WNOHANG)[0]]
        if len(header) < _LENGTH.size:
            for pid in children:
                os.kill(pid, signal.SIGTERM)
            return None
        (length,) = _LENGTH.unpack(header)
        content = b""
        while len(content) < length and (part := requests.recv(length - len(content))):
            content += part
        if len(content) < length:
            return None
        if (child := os.fork()) == 0:
            requests.close()
            log, status = files
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            return json.loads(content) | {"status": status}
        children.append(child)
        for file in files:
            os.close(file)


def run(request: dict[str, Any]) -> None:
    """Run a request's command in this process, as ``python -m`` would, and tell its exit code."""
    import torch
    from tqdm import tqdm

    # The one that forks share would stay locked for all others if this process were killed as it draws a bar.
    tqdm.set_lock(threading.RLock())
    if torch.cuda._is_in_bad_fork():  # an import has touched CUDA after all: begin anew, with the same pipe
        os.set_inheritable(request["status"], True)
        os.execv(sys.executable, [sys.executable, "-m", "clpl_moe.ablate.server", json.dumps(request)])
    code = 0
    try:
        sys.argv = [request["module"], *request["arguments"]]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(request["status"], f"{code}".encode())
    sys.exit(code)


def main() -> None:
    """The server: load the modules, then fork."""
    if len(sys.argv) > 1:  # a child that had to begin anew
        return run(json.loads(sys.argv[1]))
    # The caller is told of an interruption, too, and ends what is under way.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Some modules ask for GPUs at import: this way it does not initialise CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    requests = socket.socket(fileno=os.dup(0))
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    for name in PRELOADED:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    request = serve(requests)
    if request is None:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = request.pop("environment")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["folder"])
    os.write(request["status"], f"{os.getpid()}\n".encode())
    run(request)


if __name__ == "__main__":
    main()
