"""The points at which tests hold drivers and jobs, and how jobs begin there."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import subprocess
import sys

import psutil
import pytest
from support import warm
from support.holds import POINTS, Holds
from support.waiting import LIMIT, wait_for


@pytest.mark.parametrize("name", [name for name, point in POINTS.items() if point.module])
def test_a_point_is_in_the_product(name):
    point = POINTS[name]
    assert callable(functools.reduce(getattr, point.function.split("."), importlib.import_module(point.module)))


def test_a_process_is_held_and_released(tmp_path):
    """One that looks like a job, before python runs anything of it; another program is not held."""
    holds = Holds(tmp_path)
    start = holds.hold("start", job="7")
    environment = os.environ | holds.environment() | {"SUBMITIT_LOCAL_JOB_ID": "7"}
    command = [sys.executable, "-c", "print('through')"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "through\n"
    job = subprocess.Popen([*command, "submitit.core._submit"], env=environment, stdout=subprocess.PIPE, text=True)
    (held,) = start.reached()
    assert held.process().pid == job.pid
    start.release()
    assert job.communicate()[0] == "through\n"
    assert not held.alive()


WARM = """
import os, signal, sys
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(7))
print(os.getpid(), "torch" in sys.modules, flush=True)
signal.pause()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGUSR2, 7), (signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_a_job_that_begins_warm_is_the_process_that_was_started(signum, code):
    """What signals that one gets the job gets; it ends as the job does, and the job with it."""
    environment = os.environ | warm.for_jobs(dict(os.environ))
    command = [sys.executable, "-u", "-c", WARM, "submitit.core._submit"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        pid, has_torch = process.stdout.readline().split()
        assert int(pid) != process.pid
        assert has_torch == "True"
        process.send_signal(signum)
        assert process.wait(LIMIT) == code
    wait_for("end of the job", lambda: not psutil.pid_exists(int(pid)))


class Ended:
    """A driver that has ended."""

    def ended(self) -> bool:
        return True

    def output(self) -> str:
        return "its last words"


def test_nothing_waits_for_a_driver_that_has_ended():
    with pytest.raises(AssertionError, match=r"there was no miracle:\s+its last words"):
        wait_for("miracle", lambda: False, Ended())
    assert wait_for("what is there", lambda: "this", Ended()) == "this"
