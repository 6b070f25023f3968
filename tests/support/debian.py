"""Programs that tests run and pip does not bring: Debian packages, which LORVP_TEST_INSTALL=1 has them install."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
INSTALL = "LORVP_TEST_INSTALL"


def need(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Skips the test, or in CI fails it, where the programs are not here and are not installed, and says why."""
    if problem := _install(programs, packages):
        missing(problem)


def missing(problem: str) -> None:
    """What a test can't do without."""
    (pytest.fail if os.environ.get("CI") and _may_install() else pytest.skip)(problem)


def _may_install() -> bool:
    return os.environ.get(INSTALL) == "1"


def _lacking(programs: Sequence[str]) -> list[str]:
    return [name for name in programs if not shutil.which(name, path=PATH)]


def _install(programs: Sequence[str], packages: Sequence[str]) -> str:
    """Why there are still programs lacking, if there are."""
    if not (lacking := _lacking(programs)):
        return ""
    if not _may_install():
        return f"no {', '.join(lacking)} here; {INSTALL}=1 has the tests install {' '.join(packages)}"
    if os.geteuid() or not shutil.which("apt-get"):
        return f"no {', '.join(lacking)} here, and no root with apt-get to install {' '.join(packages)}"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with open("/tmp/lorvp-apt.lock", "w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        for verb in (["update", "-qq"], ["install", "-yqq", "--no-install-recommends", *packages]):
            if not _lacking(programs):
                return ""  # by another process
            done = subprocess.run(["apt-get", *verb], env=environment, capture_output=True, text=True)
            if done.returncode:
                return f"apt-get {verb[0]} failed: {done.stderr.strip().splitlines()[-1:]}"
    return ""
