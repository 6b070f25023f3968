"""`make coverage` counts what drivers and jobs run, and not only what pytest's own process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.snapshot import CHECKOUT

SWEEP = ("sweeps/quickstart.yaml", "--set=search.trials=1", "--set=search.concurrent=1", "--set=trial.epochs=1")
SWEEP += ("--set=early_stopping.rule=none", "--set=trial.dataset.max_per_class=20", "--set=control=null")


@pytest.mark.slow
def test_lines_that_drivers_and_jobs_run_are_counted(tmp_path):
    """In a sweep of one trial, by the settings in pyproject.toml: the driver is a script, the job runs copied code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    environment |= {"COVERAGE_FILE": str(tmp_path / "data"), "PYTHONPATH": str(CHECKOUT)}

    def coverage(*arguments: str | Path) -> None:
        command = [sys.executable, "-m", "coverage", *map(str, arguments)]
        done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    coverage("run", "sweeps/launch.py", *SWEEP, f"--set=output={tmp_path / 'runs'}")
    coverage("combine")
    coverage("json", "-o", tmp_path / "report.json")
    counted = json.loads((tmp_path / "report.json").read_text())["files"]
    for name, function in (
        ("sweeps/launch.py", "sweep_folder"),
        ("sweeps/run/driver.py", "train"),
        ("cluster/job.py", "train_one_by_one"),
        ("lorvp/training/trainer.py", "Trainer.train_step"),
    ):
        assert counted[name]["functions"][function]["summary"]["percent_covered"] >= 40, name
    assert all(not Path(name).is_absolute() for name in counted), "a copy was taken for a file of its own"
    assert "lorvp/bench/published.py" in counted, "a file that nobody imported counts as well"
