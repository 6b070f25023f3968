"""A job's process that has its libraries from the first moment on: forked from `support.warm`'s, which has them.

What was started stays, holding the job's place: its parent waits for it, signals it and kills it as if it were the job.
It passes signals on and ends as the job does; the job ends with it. Only a stop by SIGSTOP reaches no more than it.

It imports the standard library alone, as it runs before anything else in the process does.
"""

from __future__ import annotations

import array
import json
import os
import resource
import signal
import socket
import sys

VARIABLE = "LORVP_TEST_WARM"
"""The socket of the process that forks; empty in a job that was forked."""
PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT")


def wanted() -> bool:
    """Whether this process is a job that is to be forked."""
    return bool(os.environ.get(VARIABLE)) and "submitit.core._submit" in sys.orig_argv


def was_forked() -> bool:
    return os.environ.get(VARIABLE) == ""


def take_place() -> None:
    """Has the job forked, and ends with it."""
    arguments = [argument for argument in sys.orig_argv[1:] if argument != "-u"]
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ) | {VARIABLE: ""}}
    with socket.socket(socket.AF_UNIX) as job:
        job.connect(os.environ[VARIABLE])
        for name in PASSED_ON:
            signum = getattr(signal, name)
            signal.signal(signum, lambda signum, _: job.send(bytes([signum])))
        message = json.dumps(request).encode()
        files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))]
        job.sendmsg([len(message).to_bytes(4, "big")], files)
        job.sendall(message)
        ended = job.makefile().readline()
    code = int(ended or -signal.SIGKILL)  # the fork is gone, too
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
