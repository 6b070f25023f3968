"""Python commands in processes of their own that begin with the libraries imported: forked from one that has them.

Importing torch, timm and MLflow takes longer than most of the commands that tests run. Only libraries are there
already: the project's own modules each command imports by itself, from the PYTHONPATH and the folder that it is given.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

LIBRARIES = ("torch", "torch._dynamo", "timm", "sklearn.datasets", "scipy.stats", "pandas", "pyarrow.parquet", "optuna")
LIBRARIES += ("optuna.importance", "ray.tune.execution.tune_controller", "mlflow", "mlflow.pytorch", "typer")
LIBRARIES += ("mlflow.store.tracking.sqlalchemy_store", "matplotlib.figure", "matplotlib.backends.backend_agg")
LIBRARIES += ("rich.table", "submitit")
started: set[int] = set()
"""Process ids, which a test must leave to those after it."""
_requests: socket.socket | None = None


class Process:
    """A command that was started; what it has of subprocess.Popen means the same."""

    def __init__(self, status: int) -> None:
        self._status = os.fdopen(status, "rb", buffering=0)
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    arguments: Sequence[str], folder: Path, environment: dict[str, str], stdout: IO[str], stderr: IO[str]
) -> Process:
    """Starts `python` with these arguments: `-m MODULE ...`, `-c CODE ...` or `FILE ...`, in this folder."""
    request = {"arguments": list(arguments), "folder": str(folder), "environment": environment}
    ended, end = os.pipe()
    try:
        message = json.dumps(request).encode()
        socket.send_fds(_process(), [len(message).to_bytes(4)], [stdout.fileno(), stderr.fileno(), end])
        _process().sendall(message)
    finally:
        os.close(end)
    return Process(ended)


def run(arguments: Sequence[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What `python` with these arguments did, once it has ended."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(arguments, folder, environment, out, err)
        try:
            code = process.wait()
        except BaseException:  # pytest's timeout
            process.kill()
            raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(list(arguments), code, out.read(), err.read())


def end_all() -> None:
    """Ends what was started and still runs, and what that has started."""
    for pid in started:
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _process() -> socket.socket:
    """The way to the process that has the libraries, started by the first who asks; it ends with this one."""
    global _requests
    if _requests is None:
        _requests, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        started.add(process.pid)
        theirs.close()
        atexit.register(process.wait)
        atexit.register(_requests.close)
    return _requests


def _serve(requests: socket.socket) -> dict[str, Any]:
    """Forks for each request. Returns, in the process that is to carry it out, what is asked."""
    for name in LIBRARIES:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        length, files, _, _ = socket.recv_fds(requests, 4, 3)
        if not length:
            sys.exit()
        request = json.loads(requests.recv(int.from_bytes(length), socket.MSG_WAITALL))
        if not os.fork():
            break
        for file in files:
            os.close(file)
    requests.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, err, status = files
    os.setsid()
    pid = os.fork()
    if pid:
        os.write(status, f"{pid}\n".encode())
        _, ended = os.waitpid(pid, 0)
        os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
        os._exit(0)
    os.close(status)
    for file, place in ((out, 1), (err, 2)):
        os.dup2(file, place)
        os.close(file)
    return request


def _carry_out(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """What the interpreter does at its start."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.orig_argv = ["python", *arguments]
    first, *rest = arguments
    program = rest.pop(0) if first in ("-m", "-c") else first
    sys.argv = ["-c" if first == "-c" else program, *rest]
    places = environment.get("PYTHONPATH", "").split(os.pathsep)
    beside = str(Path(program).absolute().parent) if program is first else folder if first == "-m" else ""
    sys.path[:] = [beside, *filter(None, places), *(path for path in sys.path[1:] if path not in _PYTHONPATH)]
    importlib.invalidate_caches()
    with suppress(ImportError):
        importlib.import_module("sitecustomize")
    if first == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    _PYTHONPATH = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    _carry_out(**_serve(socket.socket(fileno=int(sys.argv[1]))))
