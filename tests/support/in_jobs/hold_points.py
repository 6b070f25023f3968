"""The points at which a driver or a job stops when a test has asked for it; the test's side is `support.holds`.

LORVP_TEST_HOLDS names a folder. A file `holds/NAME.json` there asks for a hold: at which point, and of what (a trial,
an epoch, an attempt ...). A process that gets to that point writes `reached/NAME-...json`, and goes on once the file
that asked for it is gone. Signals come through meanwhile. `settings.json` gives the product's constants other values.

It imports the standard library alone, as it runs before anything else in the process does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "LORVP_TEST_HOLDS"
JOB, DRIVER = "job", "driver"
BEFORE, AFTER, WITHIN = "before", "after", "within"
"""When to stop: before a function's first line, after its last, or at the end of the block of a context manager."""
LIMIT_SECONDS = 900.0
"""Longer than any test: a process that is held for so long has been forgotten."""

Context = dict[str, Any]


def of_trainer(trainer: Any, *_: Any) -> Context:
    attempt = trainer.folder.name if trainer.folder else None
    step = trainer.epoch.step + 1 if trainer.in_epoch else None
    trial = trainer.config.content_hash()
    return {"trial": trial, "attempt": attempt, "epoch": len(trainer.results) + 1, "step": step}


def of_checkpoint(path: Path) -> Context | None:
    """The file of a checkpoint; None for any other that is replaced."""
    return _of_attempt(path.parent) if path.name == "checkpoint.pt" else None


def of_record(attempt: Any, result: dict[str, Any]) -> Context | None:
    """An epoch that a job has trained; None for those that an attempt takes over as it is claimed."""
    context = _of_attempt(attempt.path)
    return context | {"epoch": result["epoch"]} if context["attempt"].isdigit() else None


def _of_attempt(path: Path) -> Context:
    return {"trial": path.parent.parent.name, "attempt": path.name}


def of_folder(trial: Any, *_: Any) -> Context:
    return {"trial": trial.name}


def of_suggestions(suggestions: Any, *_: Any) -> Context:
    return {"number": len(suggestions.read())}


def of_nothing(*_: Any) -> Context:
    return {}


@dataclass(frozen=True)
class Point:
    """A place in the product."""

    where: str
    """Which of a sweep's processes stops there."""
    module: str = ""
    function: str = ""
    when: str = BEFORE
    context: Callable[..., Context | None] = of_nothing


POINTS = {
    "start": Point(JOB),  # before anything of the job is imported, its handlers of signals among it
    "epoch": Point(JOB, "lorvp.training.trainer", "Trainer.start_epoch", BEFORE, of_trainer),
    "step": Point(JOB, "lorvp.training.trainer", "Trainer.train_step", BEFORE, of_trainer),
    "validation": Point(JOB, "lorvp.training.trainer", "Trainer.batch_metrics", BEFORE, of_trainer),
    "checkpoint": Point(JOB, "lorvp.utils.files", "replacing", WITHIN, of_checkpoint),  # written, and not renamed yet
    "recorded": Point(JOB, "cluster.trial_folder", "Attempt.append", AFTER, of_record),
    "handing over": Point(JOB, "cluster.trial_folder", "TrialFolder.assigned_next", BEFORE, of_folder),
    "signalled": Point(
        JOB, "cluster.job", "RequeueHandler._note", AFTER
    ),  # the limit's or a preemption's signal has come
    "suggested": Point(DRIVER, "sweeps.search.suggest", "Suggestions.append", AFTER, of_suggestions),
    "noting": Point(DRIVER, "cluster.trial_folder", "TrialFolder.record_job", BEFORE, of_folder),  # sbatch has answered
    "chosen": Point(DRIVER, "sweeps.results.confirm", "choose", AFTER),
}
"""By the names that tests use."""


def install(begins: bool = True) -> None:
    """Makes this process stop where it is asked to, if it is a sweep's driver or job; at "start" if it `begins`."""
    words = " ".join(sys.orig_argv)
    if "submitit.core._submit" in words:
        role = JOB
    elif "sweeps/launch.py" in words or "sweeps.launch" in words:
        role = DRIVER
    else:
        return
    folder = Path(os.environ[VARIABLE])
    settings = _read(folder / "settings.json") or {}
    here = {name: point for name, point in POINTS.items() if point.where == role}
    sys.meta_path.insert(0, _Finder(folder, here, settings))
    if "start" in here and begins:
        stop_at(folder, "start", lambda: {})


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as those that come after it do, and puts the points into them once they have been run."""

    def __init__(self, folder: Path, points: dict[str, Point], settings: dict[str, Any]) -> None:
        self._folder, self._points, self._settings = folder, points, settings
        self._modules = {point.module for point in points.values()} | {name.rpartition(".")[0] for name in settings}

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in self._modules:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = functools.partial(self._execute, spec.loader.exec_module)
                return spec
        return None

    def _execute(self, execute: Callable[[Any], None], module: Any) -> None:
        execute(module)
        for name, value in self._settings.items():
            owner, _, constant = name.rpartition(".")
            if owner == module.__name__:
                getattr(module, constant)  # or it has another name by now
                setattr(module, constant, value)
        for name, point in self._points.items():
            if point.module == module.__name__:
                *owners, attribute = point.function.split(".")
                owner = functools.reduce(getattr, owners, module)
                setattr(owner, attribute, _stopping(getattr(owner, attribute), self._folder, name, point))


def _stopping(function: Callable[..., Any], folder: Path, name: str, point: Point) -> Callable[..., Any]:
    """`function`, which stops at the point."""

    @contextmanager
    def within(*arguments: Any, **options: Any) -> Iterator[Any]:
        with function(*arguments, **options) as value:
            yield value
            stop_at(folder, name, lambda: point.context(*arguments, **options))

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if point.when == BEFORE:
            stop_at(folder, name, lambda: point.context(*arguments, **options))
        value = function(*arguments, **options)
        if point.when == AFTER:
            stop_at(folder, name, lambda: point.context(*arguments, **options))
        return value

    return functools.wraps(function)(within if point.when == WITHIN else wrapped)


def stop_at(folder: Path, point: str, ask: Callable[[], Context | None]) -> None:
    """Waits as long as there is a hold that is meant for this process at this point."""
    asked_for = [path for path in (folder / "holds").glob("*.json") if path.name.startswith(f"{point}-")]
    context = ask() if asked_for else None
    if context is None:
        return
    context |= _of_process()
    for path in asked_for:
        wanted = _read(path)
        if wanted is not None and all(context.get(key) == value for key, value in wanted.items()):
            _wait(folder, path, context)


def _wait(folder: Path, hold: Path, context: Context) -> None:
    write(folder / "reached" / f"{hold.stem}-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}.json", context)
    deadline = time.monotonic() + LIMIT_SECONDS
    while hold.exists():
        if time.monotonic() > deadline:
            print(f"held at {hold.stem} and forgotten", file=sys.stderr, flush=True)
            os._exit(99)
        time.sleep(0.02)


def _of_process() -> Context:
    """Which process this is, also where it has a process tree of its own; and the job that it is."""
    environ = os.environ
    job = environ.get("SUBMITIT_LOCAL_JOB_ID") or environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    restarts = int(environ.get("SLURM_RESTART_COUNT", 0))
    return {"pid": os.getpid(), "tree": os.readlink("/proc/self/ns/pid"), "job": job, "restarts": restarts}


def write(path: Path, value: Any) -> None:
    """Whole at once, for whoever looks."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
