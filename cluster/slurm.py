"""Jobs on a SLURM cluster, submitted by submitit; what became of them is asked of squeue, for all at once."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm import slurm

from cluster import code
from cluster.folder import JobState, TrialFolder
from cluster.job import TrialJob
from cluster.profile import Profile
from lorvp.files import write_json

FIRST_POLL, LAST_POLL = 2.0, 30.0
"""Seconds between two questions to the controller: the first while something changes, growing to the last."""
CLIENT_TIMEOUT = 30
"""Seconds that a command of SLURM's may take."""
NO_ANSWER = "{} did not answer within {} s"
TIMED_OUT = 124
"""The exit code of `timeout` for a command that it ended."""


def _sbatch_in_time(executor: submitit.SlurmExecutor, submission_file_path: Path) -> list[str]:
    """submitit's command, with the time limit that submitit does not give it."""
    return ["timeout", "--kill-after=5", str(CLIENT_TIMEOUT), "sbatch", str(submission_file_path)]


# Set in the class itself, since submitit submits an array by a new executor, which is none of a class of ours.
setattr(submitit.SlurmExecutor, "_make_submission_command", _sbatch_in_time)  # noqa: B010  mypy's words on the other way


class SlurmCluster:
    """Submits in arrays, and keeps the last answer of squeue between two questions.

    squeue knows the jobs that wait and run and, for some minutes, those that ended. Of older ones, which a driver asks
    for that was away, accounting knows; where it is off they count as lost.
    """

    def __init__(self, profile: Profile, sweep: Path, sweep_id: str, concurrent: int, pack: int | str) -> None:
        self.profile = profile
        self.folder = sweep / "jobs"
        self.python = code.python(sweep / "code", profile.container)
        self.trials_per_job = profile.trials_per_job
        self.pack = pack
        self.jobs_in_flight = profile.jobs_in_flight or concurrent
        self.max_submissions = 1 + profile.requeues
        self.name = sweep_name(sweep_id)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._states: dict[str, JobState] = {}
        self._past: dict[str, JobState] = {}  # what accounting says of jobs that the controller has forgotten
        self._accounting = True
        self._pause = FIRST_POLL
        self._next_question = 0.0

    def submit(self, trials: Sequence[TrialFolder], exclude: str) -> None:
        """Submits a job for each of `trials`, as arrays of at most `array_chunk`, and notes its id in the folder.

        `exclude` names a node that is not to be used, or is empty.
        """
        profile = self.profile.model_copy(
            update={"exclude": ",".join(filter(None, [self.profile.exclude, exclude])) or None}
        )
        chunk = min(self.profile.array_chunk, max_array_size())
        for start in range(0, len(trials), chunk):
            part = trials[start : start + chunk]
            # Written first: a driver that is killed before it has noted the ids finds the jobs by their name.
            intent = self.folder / f"{self.name}-{uuid.uuid4().hex[:8]}.json"
            write_json(intent, [trial.name for trial in part])
            executor = submitit.SlurmExecutor(self.folder, max_num_timeout=self.profile.requeues, python=self.python)
            executor.update_parameters(**sbatch_parameters(profile, intent.stem))
            arguments = (self._threads, self.trials_per_job, self.pack)
            try:
                with executor.batch():
                    jobs = [executor.submit(TrialJob(), trial.path, *arguments) for trial in part]
            except submitit.core.utils.FailedJobError as error:
                if getattr(error.__cause__, "returncode", None) == TIMED_OUT:
                    raise OSError(NO_ANSWER.format("sbatch", CLIENT_TIMEOUT)) from None
                raise
            for trial, job in zip(part, jobs, strict=True):
                trial.submitted(job.job_id, self.folder / f"{job.job_id}_0_log.out")
            intent.unlink(missing_ok=True)
        self._pause, self._next_question = FIRST_POLL, 0.0

    def adopt(self, trials: Sequence[TrialFolder]) -> None:
        """Finds the jobs that were submitted and not noted: by a driver that was killed, or that got no answer."""
        by_name = {trial.name: trial for trial in trials}
        intents = list(self.folder.glob(f"{self.name}-*.json"))
        jobs = self._squeue("%i|%j") if intents else []
        for intent in intents:
            asked_for = json.loads(intent.read_text())
            for job_id, job_name in jobs:
                if job_name == intent.stem:
                    _, _, index = job_id.partition("_")
                    trial = by_name.get(asked_for[int(index or 0)])
                    if trial:
                        trial.submitted(job_id, self.folder / f"{job_id}_0_log.out")
                        self._next_question = 0.0  # the answer that is kept may be older than the job
            intent.unlink(missing_ok=True)

    def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """What SLURM last said of each job; those that it never knew are left out."""
        if time.monotonic() >= self._next_question:
            rows = self._squeue("%i|%T|%r|%N")
            states = {job_id: JobState(state, reason.replace("None", ""), node) for job_id, state, reason, node in rows}
            self._pause = FIRST_POLL if states != self._states else min(1.5 * self._pause, LAST_POLL)
            self._states = states
            self._next_question = time.monotonic() + self._pause
            self._ask_accounting([job_id for job_id in job_ids if job_id not in states and job_id not in self._past])
        known = self._past | self._states
        return {job_id: known[job_id] for job_id in job_ids if job_id in known}

    def cancel(self, job_ids: Sequence[str]) -> None:
        if job_ids:
            _client("scancel", "--quiet", *job_ids)
            self._next_question = 0.0

    @property
    def _threads(self) -> int:
        return self.profile.cpus_per_gpu * self.profile.gpus

    def _ask_accounting(self, job_ids: Sequence[str]) -> None:
        """How jobs ended that squeue no longer lists, where the site keeps account."""
        if not (job_ids and self._accounting):
            return
        columns = ["--noheader", "--parsable2", "--allocations", "--format=JobID,State,NodeList"]
        try:
            rows = [row.split("|") for row in _client("sacct", *columns, f"--jobs={','.join(job_ids)}").splitlines()]
        except OSError:
            self._accounting = False
            return
        # `CANCELLED by 0`; what accounting takes to be alive has died without its knowledge
        past = {job_id: JobState(state.split()[0], node=nodes) for job_id, state, nodes in rows}
        self._past |= {job_id: state for job_id, state in past.items() if not state.alive}

    def _squeue(self, columns: str) -> list[list[str]]:
        """All jobs of this sweep, an array's each on its own. Raises OSError when the controller doesn't answer."""
        question = ["squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}"]
        rows = [row.split("|") for row in _client(*question, f"--format=%j|{columns}").splitlines()]
        return [row[1:] for row in rows if row[0].startswith(self.name)]


def sbatch_parameters(profile: Profile, name: str) -> dict[str, Any]:
    """The profile in submitit's words."""
    limit = profile.time_limit_minutes
    parameters = {
        "job_name": name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "gres": profile.gres,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "mail_user": profile.mail_user,
        "mail_type": profile.mail_type,
        "time": limit,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": profile.cpus_per_gpu * profile.gpus,
        "mem": f"{round(1024 * profile.memory_gb_per_gpu * profile.gpus)}M",
        "signal_delay_s": min(90, 60 * limit // 3),
        "setup": profile.setup or None,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **profile.sbatch},
    }
    return {key: value for key, value in parameters.items() if value is not None}


def sbatch_file(profile: Profile, sweep: Path) -> str:
    """The file that sbatch would be given for one trial of the sweep in the folder `sweep`."""
    python, jobs = code.python(sweep / "code", profile.container), sweep / "jobs"
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(jobs))}"
    return slurm._make_sbatch_string(command, jobs, **sbatch_parameters(profile, "lorvp"))


def submit_driver(profile: Profile, sweep: Path, sweep_id: str, arguments: Sequence[str]) -> tuple[str, Path]:
    """Submits the driver of the sweep in the folder `sweep` as a job; its id, and its log.

    `arguments` are those of `sweeps/launch.py`. It runs where it is submitted from, as paths may be relative to there,
    and is told by SIGUSR2 that its time limit nears. Raises OSError with sbatch's own words.
    """
    driver = profile.driver
    log = sweep / "driver-%j.log"
    options = {
        "job-name": f"{sweep_name(sweep_id)}-driver",
        "partition": driver.partition or profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "cpus-per-task": driver.cpus,
        "mem": f"{round(1024 * driver.memory_gb)}M",
        "time": driver.time_limit_minutes,
        "signal": f"B:USR2@{min(120, 60 * driver.time_limit_minutes // 3)}",
        "output": log,
        "open-mode": "append",
        "requeue": True,
    } | driver.sbatch
    command = ["sbatch", "--parsable"]
    command += [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items() if value]
    lines = [*profile.setup, f"exec {code.python(sweep / 'code')} -u -m sweeps.launch {shlex.join(arguments)}"]
    job_id = _client(*command, "--wrap", "\n".join(lines)).strip().split(";")[0]
    return job_id, Path(str(log).replace("%j", job_id))


def requeue_this_job() -> None:
    """Ends the job that this process is, and has SLURM start it again. Raises OSError if it can't."""
    _client("scontrol", "requeue", os.environ["SLURM_JOB_ID"])


def sweep_name(sweep_id: str) -> str:
    """What the names of all jobs of a sweep begin with."""
    return f"lorvp-{sweep_id[:8]}"


def max_array_size() -> int:
    """How many jobs this site lets an array have."""
    for line in _client("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize":
            return max(1, int(value) - 1)
    return 1


def _client(*command: str) -> str:
    """What a SLURM command prints. Raises OSError with its own words when it fails or doesn't answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise OSError(NO_ANSWER.format(command[0], CLIENT_TIMEOUT)) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(f"{command[0]}: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout
