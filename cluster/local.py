"""Jobs on this machine, through submitit's local executor."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import submitit

from cluster import job
from cluster.folder import TrialFolder

UNLIMITED_MINUTES = 60 * 24 * 365


class LocalCluster:
    """Starts a process per job, and gives each the GPU that the fewest of them use, where there is one."""

    def __init__(self, jobs_in_flight: int) -> None:
        self.jobs_in_flight = jobs_in_flight
        self.threads = max(1, len(os.sched_getaffinity(0)) // jobs_in_flight)
        self._gpu_of: dict[str, int] = {}

    def submit(self, trial: TrialFolder) -> str:
        """Starts the trial's job and returns its id."""
        gpu = self._free_gpu()
        executor = submitit.LocalExecutor(trial.logs)
        executor.update_parameters(
            timeout_min=UNLIMITED_MINUTES,
            gpus_per_node=0 if gpu is None else 1,
            visible_gpus=() if gpu is None else (gpu,),
            stderr_to_stdout=True,
        )
        job_id = executor.submit(job.run, trial.path, self.threads).job_id
        if gpu is not None:
            self._gpu_of[job_id] = gpu
        return job_id

    def alive(self, job_ids: Sequence[str]) -> set[str]:
        """Those of `job_ids` whose process runs, also when another driver started it."""
        return {job_id for job_id in job_ids if _process(job_id)}

    def cancel(self, job_ids: Sequence[str]) -> None:
        for job_id in job_ids:
            controller = _process(job_id)
            if controller:
                for process in [controller, *controller.children(recursive=True)]:
                    process.kill()

    def _free_gpu(self) -> int | None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            gpus = [int(gpu) for gpu in visible.split(",") if gpu.isdigit()]
        else:
            gpus = sorted(int(p.name[6:]) for p in Path("/dev").glob("nvidia*") if p.name[6:].isdigit())
        alive = self.alive(list(self._gpu_of))
        used = Counter(gpu for job_id, gpu in self._gpu_of.items() if job_id in alive)
        return min(gpus, key=lambda gpu: used[gpu]) if gpus else None


def _process(job_id: str) -> psutil.Process | None:
    """submitit's controller of a local job, whose process id is the job's id."""
    try:
        process = psutil.Process(int(job_id))
        running = process.status() != psutil.STATUS_ZOMBIE and "submitit.local._local" in process.cmdline()
        return process if running else None
    except psutil.NoSuchProcess:
        return None
