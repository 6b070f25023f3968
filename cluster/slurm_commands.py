"""SLURM's commands as this process calls them: in limited time, and untouched by what the user's shell tells them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable

LIMIT = 30
"""Seconds that a command may take."""
NO_ANSWER = "{} did not answer within {} s"
TIMED_OUT = 124
"""The exit code of `timeout` for a command that it ended."""
SLURM_VARIABLES = re.compile("(SBATCH|SALLOC|SQUEUE|SACCT|SCANCEL|SCONTROL|SINFO|SRUN|SLURM)_")
"""Variables by which a shell, or the allocation that the driver runs in, changes what these commands do and print."""
_visible = {"SLURM_CONF"}


def show_variables(variables: Iterable[str]) -> None:
    """Have SLURM's commands see these variables of SLURM's from now on, as the site's profile asks."""
    _visible.update(variables)


def hidden_variables() -> list[str]:
    """Name the variables of this process that SLURM's commands do not see."""
    return [name for name in os.environ if SLURM_VARIABLES.match(name) and name not in _visible]


def command_prefix() -> list[str]:
    """Give what goes before a command that somebody else calls: the environment and the time limit that `run` sets."""
    return ["env", *(f"--unset={name}" for name in hidden_variables()), "timeout", "--kill-after=5", str(LIMIT)]


def run(*command: str) -> str:
    """Give what a command prints. Raises OSError with its own words when it fails or doesn't answer."""
    hidden = hidden_variables()
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise OSError(NO_ANSWER.format(command[0], LIMIT)) from None
    if completed.returncode:
        lines = (completed.stderr or completed.stdout).strip().splitlines()
        raise OSError(f"{command[0]}: {lines[-1] if lines else f'exit code {completed.returncode}'}")
    return completed.stdout


def rows(columns: int, *command: str) -> list[list[str]]:
    """Give what a command prints between `|`; other lines, as a site's banner, are passed over."""
    lines = [line.split("|") for line in run(*command).splitlines()]
    return [line for line in lines if len(line) == columns]


def parse_job_id(output: str) -> str:
    """Find the id that `sbatch --parsable` printed, after whatever a site prints. Raises OSError if there is none."""
    ids = [match[1] for line in output.splitlines() if (match := re.fullmatch(r"(\d+)(;\S*)?", line.strip()))]
    if not ids:
        raise OSError(f"sbatch: no job id in {output.strip()!r}")
    return ids[-1]
