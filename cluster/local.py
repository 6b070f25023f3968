"""Jobs on this machine, through submitit's local executor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import psutil
import submitit

from cluster import snapshot
from cluster.base import Cluster
from cluster.job import TrialJob
from cluster.profile import Profile
from cluster.trial_folder import JobState, TrialFolder

UNLIMITED_MINUTES = 60 * 24 * 365
NVIDIA = "nvidia[0-9]*"
GPU_DEVICES = (NVIDIA, "dxg", "kfd")
"""Files in /dev, one of which a machine with a GPU has: NVIDIA's, those of WSL, AMD's."""


class LocalCluster(Cluster):
    """Starts a process per job, and gives each the GPU that the fewest of them use, where there is one."""

    def __init__(self, profile: Profile, sweep: Path, sweep_id: str, concurrent: int, pack: int | str) -> None:
        super().__init__(profile, sweep, sweep_id, concurrent, pack)
        self.python = snapshot.python(sweep / "code", by_shell=False)  # submitit starts it without one
        self.threads = max(1, len(os.sched_getaffinity(0)) // self.jobs_in_flight)
        self._gpu_of: dict[str, str] = {}

    def submit(self, trials: Sequence[TrialFolder], exclude: str) -> None:
        """Start a job for each of `trials` and notes its id in the folder; there is no node to `exclude`."""
        for trial in trials:
            gpu = self._free_gpu()
            executor = submitit.LocalExecutor(self.folder, python=self.python)
            executor.update_parameters(timeout_min=UNLIMITED_MINUTES, gpus_per_node=0, stderr_to_stdout=True)
            submitted = executor.submit(TrialJob(), trial.path, self.threads, self.trials_per_job, self.pack, gpu)
            trial.record_job(submitted.job_id, submitted.paths.stdout)
            if gpu:
                self._gpu_of[submitted.job_id] = gpu

    def adopt(self, trials: Sequence[TrialFolder]) -> None:
        """Nothing to do: an id is noted in the moment that the process starts."""

    def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Return RUNNING for each job whose process runs, whichever driver started it; leave out the others."""
        return {job_id: JobState("RUNNING") for job_id in job_ids if _process(job_id)}

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Kill each job's controller and all its child processes."""
        for job_id in job_ids:
            controller = _process(job_id)
            if controller:
                for process in [controller, *controller.children(recursive=True)]:
                    process.kill()

    def _free_gpu(self) -> str:
        """Return the GPU that the fewest jobs use, as CUDA_VISIBLE_DEVICES names it; empty where there is none."""
        alive = self.states(list(self._gpu_of))
        self._gpu_of = {job_id: gpu for job_id, gpu in self._gpu_of.items() if job_id in alive}
        used = Counter(self._gpu_of.values())
        return min(self._gpus, key=lambda gpu: used[gpu], default="")

    @cached_property
    def _gpus(self) -> list[str]:
        """This machine's GPUs, as CUDA names them: of those that the user has chosen, else all that CUDA counts."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            return list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, visible.split(","))))
        if not any(list(Path("/dev").glob(pattern)) for pattern in GPU_DEVICES):
            return []
        counted = _counted_by_cuda()
        if not counted and any(Path("/dev").glob(NVIDIA)):
            return ["0"]  # a job is given it, finds that torch can't use it, and says why
        return list(map(str, range(counted)))


def _counted_by_cuda() -> int:
    """Count the GPUs that torch can use, in a process of its own: a process that has CUDA can't be forked."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    completed = subprocess.run(command, capture_output=True, text=True)
    return int(completed.stdout.split()[-1]) if completed.returncode == 0 else 0


def _process(job_id: str) -> psutil.Process | None:
    """Find submitit's controller of a local job, whose process id is the job's id."""
    try:
        process = psutil.Process(int(job_id))
        running = process.status() != psutil.STATUS_ZOMBIE and "submitit.local._local" in process.cmdline()
        return process if running else None
    except psutil.NoSuchProcess:
        return None
