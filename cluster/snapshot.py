"""Copy the code that a sweep's jobs run, a driver that is a job among them, when the sweep starts.

Later edits of the checkout do not reach them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from lorvp.utils.files import replacing
from lorvp.utils.paths import ROOT
from lorvp.utils.plugins import COPIES, copy_of

PACKAGES = ("lorvp", "cluster", "sweeps")
CHECKOUT = ROOT


def snapshot(folder: Path, files: Iterable[Path] = ()) -> None:
    """Copy the packages that a job imports to `folder`, unless an earlier driver of the sweep has done so.

    And `files` of the user's own that it runs, to where `lorvp.utils.plugins` looks for them.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as temporary:
        for package in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(CHECKOUT / package, temporary / package, ignore=ignored)
        for file in files:
            copy = copy_of(file, temporary / COPIES.relative_to(CHECKOUT))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def python(code: Path, container: str | None = None, by_shell: bool = True) -> str:
    """Return the shell command that starts python, in the container if there is one, with the packages of `code` first.

    The user's own PYTHONPATH comes after them: as it is in the job's shell, where one runs the command (`by_shell`),
    else as it is here. PYTHONSAFEPATH keeps out the folder where the driver was started, which may be the checkout.
    """
    path = f'{shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    if not by_shell:
        path = shlex.quote(os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")])))
    command = f"env PYTHONSAFEPATH=1 PYTHONPATH={path} {shlex.quote(sys.executable)}"
    return f"{container} {command}" if container else command
