"""The test's side of the hold points in `in_jobs/hold_points.py`: asks for holds, waits for them, and releases them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from support.waiting import Watched, wait_for

IN_JOBS = Path(__file__).parent / "in_jobs"
sys.path.append(str(IN_JOBS))  # for this process it has no sitecustomize: python is long started

from hold_points import POINTS, VARIABLE, write  # noqa: E402

CLIENTS = ("sbatch", "squeue", "scancel", "sacct")
CLIENT = """\
#!/bin/sh
echo "$*" >> {calls}
exec {program} "$@"
"""


@dataclass(frozen=True)
class Held:
    """A process that stopped at a point."""

    pid: int
    tree: str
    """Its PID namespace, in which it has that number."""
    job: str | None = None
    restarts: int = 0
    """How often SLURM has started the job again."""
    trial: str = ""
    attempt: str | None = None
    epoch: int = 0
    step: int | None = None
    number: int = 0

    def process(self) -> psutil.Process:
        """As this machine knows it. Raises psutil.NoSuchProcess when it has ended."""
        for pid in psutil.pids():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
                if numbers[-1] == str(self.pid) and os.readlink(f"/proc/{pid}/ns/pid") == self.tree:
                    return psutil.Process(pid)
            except (OSError, psutil.NoSuchProcess, StopIteration):
                continue
        raise psutil.NoSuchProcess(self.pid)

    def alive(self) -> bool:
        try:
            return self.process().status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass
class Hold:
    """A hold that was asked for."""

    folder: Path
    name: str
    wanted: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / "holds" / f"{self.name}.json"

    def those(self) -> list[Held]:
        """The processes that have stopped for it so far, the first one first."""
        paths = sorted((self.folder / "reached").glob(f"{self.name}-*.json"), key=lambda path: path.stat().st_mtime_ns)
        return [Held(**json.loads(path.read_text())) for path in paths]

    def reached(self, driver: Watched | None = None, count: int = 1) -> list[Held]:
        """Waits until so many processes have stopped there, while the driver lives."""
        what = f"{count} held at {self.name} {self.wanted or ''}".rstrip()
        wait_for(what, lambda: len(self.those()) >= count, driver)
        return self.those()

    def release(self) -> None:
        """Lets them go; whoever comes later is not held."""
        self.path.unlink(missing_ok=True)


class Holds:
    """The holds of one test, in a folder, and the environment that brings them to its drivers and jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("holds", "reached", "calls", "bin"):
            (folder / name).mkdir(parents=True)
        for name in CLIENTS:
            if program := shutil.which(name):
                script = folder / "bin" / name
                script.write_text(CLIENT.format(calls=folder / "calls" / name, program=program))
                script.chmod(0o755)
        self._numbers = count(1)
        self._settings: dict[str, Any] = {}

    def environment(self) -> dict[str, str]:
        modules = os.pathsep.join(filter(None, [str(IN_JOBS), os.environ.get("PYTHONPATH")]))
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {VARIABLE: str(self.folder), "PYTHONPATH": modules, "PATH": path}

    def hold(self, point: str, **wanted: Any) -> Hold:
        """Has the processes stop that get to `point`: all of them, or those of a trial, an epoch, an attempt ..."""
        assert point in POINTS
        assert wanted.keys() <= Held.__dataclass_fields__.keys()
        hold = Hold(self.folder, f"{point}-{next(self._numbers)}", wanted)
        write(hold.path, wanted)
        return hold

    def release_all(self) -> None:
        for path in (self.folder / "holds").glob("*.json"):
            path.unlink()

    def set(self, constant: str, value: Any) -> None:
        """Gives the product's constant, `module.NAME`, another value in processes that start from now on."""
        self._settings[constant] = value
        write(self.folder / "settings.json", self._settings)

    def calls(self, client: str) -> int:
        """How often the sweep's processes have called one of SLURM's commands."""
        path = self.folder / "calls" / client
        return len(path.read_text().splitlines()) if path.exists() else 0

    def asked_again(self, driver: Watched, times: int = 2) -> None:
        """Waits until the driver has asked squeue so many times more."""
        before = self.calls("squeue")
        wait_for(f"{times} questions to squeue", lambda: self.calls("squeue") >= before + times, driver)
