"""The points at which tests hold drivers and jobs."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys

import pytest
from support.holds import POINTS, Holds
from support.waiting import wait_for


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
