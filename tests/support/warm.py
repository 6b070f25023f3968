"""Python commands in processes of their own that begin with the libraries imported: forked from one that has them.

Importing torch, timm and MLflow takes longer than most of the commands that tests run. Only libraries are there
already: the project's own modules each command imports by itself, from the PYTHONPATH and the folder that it is given.
The jobs that such a command starts, by submitit or SLURM, are forked likewise (`in_jobs/warm_start.py`).
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil

VARIABLE = "LORVP_TEST_WARM"
"""As in `in_jobs/warm_start.py`."""
LIBRARIES = ("torch", "torch._dynamo", "timm", "sklearn.datasets", "scipy.stats", "pandas", "pyarrow.parquet", "optuna")
LIBRARIES += ("optuna.importance", "ray.tune.execution.tune_controller", "mlflow", "mlflow.pytorch", "typer")
LIBRARIES += ("mlflow.store.tracking.sqlalchemy_store", "matplotlib.figure", "matplotlib.backends.backend_agg")
LIBRARIES += ("rich.table", "submitit")
started: set[int] = set()
"""Process ids, which a test must leave to those after it."""
_requests: socket.socket | None = None
_folder: Path | None = None
"""Of the socket by which jobs ask to be forked."""
IN_JOBS = Path(__file__).parent / "in_jobs"
NAMESPACES = {"mnt": 0x00020000, "uts": 0x04000000, "pid": 0x20000000}
"""What a node of a SLURM has of its own (`slurm_sim`), and `setns`'s words for it."""


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


def for_jobs(environment: dict[str, str]) -> dict[str, str]:
    """What the environment of a driver has to have in addition, for its jobs to be forked, too."""
    _process()
    modules = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    modules += [] if str(IN_JOBS) in modules else [str(IN_JOBS)]
    return {"PYTHONPATH": os.pathsep.join(modules), VARIABLE: str(_folder / "socket")}


def end_all() -> None:
    """Ends what was started and still runs, and what that has started."""
    for pid in started:
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _process() -> socket.socket:
    """The way to the process that has the libraries, started by the first who asks; it ends with this one."""
    global _requests, _folder
    if _requests is None:
        _requests, theirs = socket.socketpair()
        _folder = Path(tempfile.mkdtemp(prefix="lorvp-warm-"))
        with socket.socket(socket.AF_UNIX) as jobs:
            jobs.bind(str(_folder / "socket"))
            jobs.listen(64)
            passed = [theirs.fileno(), jobs.fileno()]
            command = [sys.executable, __file__, *map(str, passed)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=passed)
        started.add(process.pid)
        theirs.close()
        atexit.register(shutil.rmtree, _folder)
        atexit.register(process.wait)
        atexit.register(_requests.close)
    return _requests


def _serve(requests: socket.socket, jobs: socket.socket) -> dict[str, Any]:
    """Forks for each request. Returns, in the process that is to carry it out, what is asked."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each fork's first collection copies all of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        if jobs in select.select([requests, jobs], [], [])[0]:
            job, _ = jobs.accept()
            if not os.fork():
                requests.close()
                jobs.close()
                return _as_a_job(job)
            job.close()
            continue
        length, files, _, _ = socket.recv_fds(requests, 4, 3)
        if not length:
            os._exit(0)
        request = json.loads(requests.recv(int.from_bytes(length), socket.MSG_WAITALL))
        if not os.fork():
            break
        for file in files:
            os.close(file)
    requests.close()
    jobs.close()
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
    _say_to(out, err)
    return request


def _as_a_job(job: socket.socket) -> dict[str, Any]:
    """Forks a job for the process at the other end, where that is: with its node's files, hostname and process tree.

    Stays to pass signals on, to kill the job once that process is gone, and to tell it how the job has ended.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, (out, err), _, _ = socket.recv_fds(job, 4, 2)
    request = json.loads(job.recv(int.from_bytes(length), socket.MSG_WAITALL))
    place, _, _ = struct.unpack("3i", job.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    spaces = {
        name: os.open(f"/proc/{place}/ns/{name}", os.O_RDONLY) for name in NAMESPACES if _is_elsewhere(place, name)
    }
    os.setsid()
    if "pid" in spaces:
        _enter(spaces, "pid")  # of the children
    pid = os.fork()
    if not pid:
        job.close()
        for name in spaces.keys() - {"pid"}:
            _enter(spaces, name)
        for file in spaces.values():
            os.close(file)
        _say_to(out, err)
        sys.stdout.reconfigure(write_through=True)
        return request
    process = os.pidfd_open(pid)
    while process not in select.select([process, job], [], [])[0]:
        signals = job.recv(64)
        for signum in signals or [signal.SIGKILL]:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signum)
        if not signals:
            break
    _, ended = os.waitpid(pid, 0)
    with suppress(OSError):
        job.sendall(f"{os.waitstatus_to_exitcode(ended)}\n".encode())
    os._exit(0)


def _is_elsewhere(pid: int, name: str) -> bool:
    return os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")


def _enter(spaces: dict[str, int], name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(spaces[name], NAMESPACES[name]):
        raise OSError(ctypes.get_errno(), f"setns: {name}")


def _say_to(out: int, err: int) -> None:
    for file, place in ((out, 1), (err, 2)):
        os.dup2(file, place)
        os.close(file)


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
    beside = [] if environment.get("PYTHONSAFEPATH") else [beside]
    sys.path[:] = [*beside, *filter(None, places), *(path for path in sys.path[1:] if path not in _PYTHONPATH)]
    importlib.invalidate_caches()
    with suppress(ImportError):
        importlib.import_module("sitecustomize")
    if first == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(program, run_name="__main__")


def _end() -> NoReturn:
    """What the interpreter does at its end, but for one thing: to go through all that the libraries hold, 3 s of CPU.

    Called while an exception is handled, if any has ended the command.
    """
    error = sys.exception()
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    _PYTHONPATH = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    request = _serve(*(socket.socket(fileno=int(number)) for number in sys.argv[1:]))
    try:
        _carry_out(**request)
    except BaseException:
        _end()
    _end()
