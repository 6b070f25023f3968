"""Jobs on a SLURM cluster, submitted by submitit; what became of them is asked of squeue, for all at once."""

from __future__ import annotations

import json
import os
import shlex
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, JobPaths
from submitit.slurm import slurm

from cluster import slurm_commands, snapshot
from cluster.base import Cluster
from cluster.job import ANY_GPU, TrialJob
from cluster.profile import Profile, SbatchOptions
from cluster.trial_folder import JobState, TrialFolder
from lorvp.utils.files import replacing, write_json

MIN_POLL, MAX_POLL = 2.0, 30.0
"""Seconds between two questions to the controller: the first while something changes, growing to the last."""
MAX_MISSES = 2
"""Answers in a row in which nobody knows of a job, after which it counts as gone."""
UNLISTED = JobState("UNKNOWN", "squeue does not list it")
"""What is known of a job before that: it may live."""
SQUEUE = ("squeue", "--noheader", "--array", "--states=all")
MEMORY_OPTIONS = {"mem", "mem-per-cpu", "mem-per-gpu"}
"""Of sbatch's, which exclude each other."""


def _sbatch_with_limit(executor: submitit.SlurmExecutor, submission_file_path: Path) -> list[str]:
    """Return submitit's command, with the environment and the time limit that submitit does not give it."""
    return [*slurm_commands.command_prefix(), "sbatch", str(submission_file_path)]


# Set in the class itself, since submitit submits an array by a new executor, which is none of a class of ours.
setattr(submitit.SlurmExecutor, "_make_submission_command", _sbatch_with_limit)  # noqa: B010  mypy's words on the other way


class SlurmCluster(Cluster):
    """Submits in arrays, and keeps the last answer of squeue between two questions.

    squeue knows the jobs that wait and run and, for some minutes, those that ended. Of older ones, which a driver asks
    for that was away, accounting knows; where it is off they count as lost. A job is known by its id, since a site may
    rename it.
    """

    runs_drivers = True

    def __init__(self, profile: Profile, sweep: Path, sweep_id: str, concurrent: int, pack: int | str) -> None:
        super().__init__(profile, sweep, sweep_id, concurrent, pack)
        self.profile = profile
        self.python = snapshot.python(sweep / "code", profile.container)
        self.name = sweep_name(sweep_id)
        self._states: dict[str, JobState] = {}
        self._ended_states: dict[str, JobState] = {}  # what accounting says of jobs that the controller has forgotten
        self._missed: Counter[str] = Counter()
        self._accounting = True
        self._pause = MIN_POLL
        self._next_query = 0.0
        slurm_commands.show_variables(profile.slurm_variables)

    @staticmethod
    def starts_allowed(profile: Profile) -> int:
        """Return how often a trial may be started before it has failed for good."""
        return 1 + profile.requeues

    @staticmethod
    def seconds_of_a_start(profile: Profile) -> float:
        """Return the time limit of one start of a job, in seconds."""
        return 60.0 * profile.time_limit_minutes

    @staticmethod
    def batch_file(profile: Profile, sweep: Path) -> str:
        """Return the file that sbatch would be given for one trial of the sweep in the folder `sweep`."""
        python, jobs = snapshot.python(sweep / "code", profile.container), sweep / "jobs"
        command = f"{python} -u -m submitit.core._submit {shlex.quote(str(jobs))}"
        return slurm._make_sbatch_string(command, jobs, **sbatch_parameters(profile, "lorvp"))

    @staticmethod
    def submit_driver(profile: Profile, sweep: Path, sweep_id: str, arguments: Sequence[str]) -> tuple[str, Path]:
        """Submit the driver of the sweep in the folder `sweep` as a job; return its id, and its log.

        `arguments` are those of `sweeps/launch.py`. It runs where it is submitted from, as paths may be relative to
        there, and is told by SIGUSR2 that its time limit nears. Raises OSError with sbatch's own words.
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
        }
        _drop_memory_default(driver.sbatch, options)
        options |= driver.sbatch
        command = ["sbatch", "--parsable"]
        command += [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items() if value]
        lines = [*profile.setup, f"exec {snapshot.python(sweep / 'code')} -u -m sweeps.launch {shlex.join(arguments)}"]
        slurm_commands.show_variables(profile.slurm_variables)
        job_id = slurm_commands.parse_job_id(slurm_commands.run(*command, "--wrap", "\n".join(lines)))
        return job_id, Path(str(log).replace("%j", job_id))

    def submit(self, trials: Sequence[TrialFolder], exclude: str) -> None:
        """Submit a job for each of `trials`, as arrays of at most `array_chunk`, and notes its id in the folder.

        `exclude` names a node that is not to be used, or is empty. An array that is refused is halved, since a site
        may have room for a part. Raises OSError with SLURM's words when a single job is refused; those that were
        taken until then are noted.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        chunk_size = min(self.profile.array_chunk, max_array_size())
        waiting = [trials[start : start + chunk_size] for start in range(0, len(trials), chunk_size)]
        while waiting:
            chunk = waiting.pop(0)
            try:
                self._submit_array(chunk, exclude)
            except FailedJobError as error:
                if getattr(error.__cause__, "returncode", None) == slurm_commands.TIMED_OUT:
                    raise OSError(slurm_commands.NO_ANSWER.format("sbatch", slurm_commands.LIMIT)) from None
                if len(chunk) == 1:
                    raise OSError(_sbatch_errors(str(error))) from error
                half = (len(chunk) + 1) // 2
                waiting[:0] = [chunk[:half], chunk[half:]]
            finally:
                self._pause, self._next_query = MIN_POLL, 0.0

    def _submit_array(self, trials: Sequence[TrialFolder], exclude: str) -> None:
        # Written first: a driver that is killed before it has noted the ids finds the jobs by this name.
        intent = self.folder / f"{self.name}-{uuid.uuid4().hex[:8]}.json"
        write_json(intent, [trial.name for trial in trials])
        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=self.profile.requeues, python=self.python)
        excluded = ",".join(filter(None, [self.profile.exclude, exclude])) or None
        profile = self.profile.model_copy(update={"exclude": excluded})
        executor.update_parameters(**sbatch_parameters(profile, intent.stem))
        try:
            with executor.batch():
                jobs = [executor.submit(TrialJob(), *self._arguments(trial)) for trial in trials]
        except FailedJobError as error:
            if getattr(error.__cause__, "returncode", None) != slurm_commands.TIMED_OUT:
                intent.unlink()  # sbatch has said no; where it said nothing, the jobs may be there
            raise
        for trial, job in zip(trials, jobs, strict=True):
            self._record_job(trial, job.job_id)
        intent.unlink()

    def adopt(self, trials: Sequence[TrialFolder]) -> None:
        """Find the jobs that were submitted and not noted: by a driver that was killed, or that got no answer."""
        by_name = {trial.name: trial for trial in trials}
        intents = list(self.folder.glob(f"{self.name}-*.json"))
        jobs = slurm_commands.rows(3, *SQUEUE, f"--user={os.getuid()}", "--format=%i|%j|%k") if intents else []
        for intent in intents:
            names = json.loads(intent.read_text())
            for job_id, job_name, comment in jobs:
                if intent.stem in (job_name, comment):
                    _, _, index = job_id.partition("_")
                    trial = by_name.get(names[int(index or 0)])
                    if trial:
                        self._write_job_pickle(trial, job_id)
                        self._record_job(trial, job_id)
                        self._next_query = 0.0  # the answer that is kept may be older than the job
            intent.unlink(missing_ok=True)

    def _arguments(self, trial: TrialFolder) -> tuple[Path, int, int, int | str, str]:
        """Of `TrialJob`."""
        threads = self.profile.cpus_per_gpu * self.profile.gpus
        needs_gpu = self.profile.asks_for_gpus and not self.profile.allow_cpu
        return trial.path, threads, self.trials_per_job, self.pack, ANY_GPU if needs_gpu else ""

    def _record_job(self, trial: TrialFolder, job_id: str) -> None:
        trial.record_job(job_id, self.folder / f"{job_id}_0_log.out")

    def _write_job_pickle(self, trial: TrialFolder, job_id: str) -> None:
        """Write down what a job does that was submitted, where submitit has not come to that."""
        path = JobPaths(self.folder, job_id).submitted_pickle
        if not path.exists():
            submission = DelayedSubmission(TrialJob(), *self._arguments(trial))
            submission.set_timeout(self.profile.time_limit_minutes, self.profile.requeues)
            with replacing(path) as temporary:
                submission.dump(temporary)

    def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Return the last state of each job that SLURM knows; unknown jobs are left out.

        A job that squeue does not list is asked for by its id, then of accounting; what either calls alive is.
        """
        if time.monotonic() >= self._next_query:
            of_user = self._query_squeue(f"--user={os.getuid()}")
            states = {job_id: of_user[job_id] for job_id in job_ids if job_id in of_user}
            missing = [job_id for job_id in job_ids if job_id not in states and job_id not in self._ended_states]
            if missing:
                states |= self._query_by_id(missing)
                states |= self._query_accounting([job_id for job_id in missing if job_id not in states])
            unknown = [job_id for job_id in missing if job_id not in states and job_id not in self._ended_states]
            self._missed = Counter({job_id: self._missed[job_id] + 1 for job_id in unknown})
            states |= {job_id: UNLISTED for job_id in unknown if self._missed[job_id] < MAX_MISSES}
            self._pause = MIN_POLL if states != self._states else min(1.5 * self._pause, MAX_POLL)
            self._states = states
            self._next_query = time.monotonic() + self._pause
        known = self._ended_states | self._states
        return {job_id: known[job_id] for job_id in job_ids if job_id in known}

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Cancel the jobs with scancel. Raises OSError when it fails or does not answer."""
        if job_ids:
            slurm_commands.run("scancel", "--quiet", *job_ids)
            self._next_query = 0.0

    def _query_squeue(self, selection: str) -> dict[str, JobState]:
        """Raise OSError when the controller doesn't answer."""
        rows = slurm_commands.rows(4, *SQUEUE, selection, "--format=%i|%T|%r|%N")
        return {job_id: JobState(state, reason.replace("None", ""), node) for job_id, state, reason, node in rows}

    def _query_by_id(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        try:
            return self._query_squeue(f"--jobs={','.join(job_ids)}")
        except OSError as error:
            if "Invalid job id" in str(error):
                return {}
            raise

    def _query_accounting(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Return the state of each job that sacct reports alive; store how the others ended in `_ended_states`."""
        if not (job_ids and self._accounting):
            return {}
        columns = ["--noheader", "--parsable2", "--allocations", "--format=JobID,State,NodeList"]
        try:
            rows = slurm_commands.rows(3, "sacct", *columns, f"--jobs={','.join(job_ids)}")
        except OSError:
            self._accounting = False
            return {}
        # a state may be `CANCELLED by 0`
        states = {job_id: JobState(state.split()[0], node=node) for job_id, state, node in rows}
        self._ended_states |= {job_id: state for job_id, state in states.items() if not state.alive}
        return {job_id: state for job_id, state in states.items() if state.alive}


def _sbatch_errors(output: str) -> str:
    """Return the error lines of sbatch in its output; without any, the last line."""
    lines = [line.strip() for line in output.strip().splitlines()]
    errors = [line.removeprefix("sbatch: error: ") for line in lines if line.startswith("sbatch: error: ")]
    return f"sbatch: {'; '.join(dict.fromkeys(errors))}" if errors else "".join(lines[-1:])


def sbatch_parameters(profile: Profile, name: str) -> dict[str, Any]:
    """Translate the profile to submitit's parameters."""
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
        "additional_parameters": {"requeue": True, "comment": name, **profile.sbatch},
    }
    _drop_memory_default(profile.sbatch, parameters)
    return {key: value for key, value in parameters.items() if value is not None}


def _drop_memory_default(user_options: SbatchOptions, parameters: dict[str, Any]) -> None:
    """Take out how much memory we would ask for where the user does so, in whichever way."""
    if MEMORY_OPTIONS & user_options.keys():
        del parameters["mem"]


def requeue_this_job() -> None:
    """End the job that this process is, and has SLURM start it again. Raises OSError if it can't."""
    slurm_commands.run("scontrol", "requeue", os.environ["SLURM_JOB_ID"])


def sweep_name(sweep_id: str) -> str:
    """Return the prefix of the names of all jobs of a sweep."""
    return f"lorvp-{sweep_id[:8]}"


def max_array_size() -> int:
    """Return the largest job array that the site allows."""
    for line in slurm_commands.run("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize":
            return max(1, int(value) - 1)
    return 1
