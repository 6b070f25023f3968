"""Programs that tests run and pip does not bring: Debian's packages, installed where that may be done."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def need(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Skips the test, or in CI fails it, where the programs are not here and can't be installed, and says why."""
    with open("/tmp/lorvp-apt.lock", "w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        problem = _install(programs, packages)
    if problem:
        missing(problem)


def missing(problem: str) -> None:
    """What a test can't do without."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(problem)


def _install(programs: Sequence[str], packages: Sequence[str]) -> str:
    if all(shutil.which(name, path=PATH) for name in programs):
        return ""
    if os.geteuid() or not shutil.which("apt-get"):
        return f"no {programs[0]} here, and no root with apt-get to install {' '.join(packages)}"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-yqq", "--no-install-recommends", *packages]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"{' '.join(command[:2])} failed: {done.stderr.strip().splitlines()[-1:]}"
    return ""
