"""Submit a job for every trial that was asked for, and notice the jobs that died."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

from cluster.base import Cluster
from cluster.scan import FollowedTrial, Scan
from cluster.trial_folder import AUTO, NODE_FAILURE_PREFIX, Cause, JobState, State, StopReason, pack_file

FINAL_STATES = {"OUT_OF_MEMORY": Cause.OUT_OF_MEMORY, "DEADLINE": Cause.LOST}
"""States of a job that another start would end in again."""
HELD_BY_NODE = "launch failed requeued held"
"""SLURM's reason for a job that a node could not start, as its prolog failed: SLURM leaves it to somebody to go on."""
OUT_OF_MEMORY_WORDS = ("out of memory", "oom-kill", "oom_kill")
TELLING_WORDS = (*OUT_OF_MEMORY_WORDS, "killed", "no such file", "cannot open shared object", "no space left")
"""What lines of a log say, in small letters, that tell why a job ended without a word of ours."""
MAX_UNEXPLAINED_STARTS = 3
"""Starts of a job that keeps dying without a word, which the place where it ran has no word for either."""
MAX_WAIT = 60.0
DISK_FULL_POLL = 5.0
INTERRUPT_POLL = 0.1
LOG_LINES = 20
"""The end of a log, where a job says that its disk is full."""


class JobManager:
    """Looks after the jobs of the trials that its `scan` follows; `poll` does what is due and returns at once."""

    def __init__(self, trials: Path, cluster: Cluster) -> None:
        self.cluster = cluster
        self.scan = Scan(trials)
        self._trials = trials
        self.states: dict[str, JobState] = {}
        """What is known of the job of each open trial, by the trial's name."""
        self.troubles: dict[str, str] = {}
        """Why a trial can't have another job now, by its name."""
        self._idle_jobs: dict[str, list[FollowedTrial]] = {}
        """Jobs that may be handed a trial: those of their trials that have ended and that none follows."""
        self._unread_ends: list[FollowedTrial] = []  # whose job's place is still to be found free
        self._interrupting = False
        # What this manager has seen of a trial; an earlier driver's is another story.
        self._submissions: Counter[str] = Counter()
        self._starts: dict[str, tuple[int, int]] = {}  # epochs recorded, and the starts since
        self._failed_nodes: dict[str, str] = {}  # the node that failed it
        self._sick_nodes: set[str] = set()  # nodes that said so themselves
        self._not_before: dict[str, float] = {}
        self._refusal_wait, self._refused_until = 0.0, 0.0
        self._adopted = False

    def take_over(self) -> None:
        """Void what an earlier driver told jobs: to stop, as it was ending, or by a search that is now asked again."""
        for trial in self.scan.open():
            trial.clear_stop()

    def adopt(self) -> None:
        """Find the jobs that were submitted and not noted. Raises OSError when the cluster does not answer."""
        self.cluster.adopt(self.scan.open())
        self._adopted = True

    def poll(self) -> None:
        """Get jobs for the trials that wait and those whose job died, within the limit of jobs in flight.

        Raises OSError when that can't be.
        """
        if self._interrupting:
            return
        open_trials, ended = self.scan.survey()
        self._find_idle_jobs(ended)
        now = time.monotonic()
        if not self._adopted or (self._refusal_wait and now >= self._refused_until):
            self.adopt()  # an earlier driver's; and a refusal may have been an answer that got lost
        jobs = {trial.name: job["id"] for trial in open_trials if (job := trial.job())}
        unread = [job_id for trial in self._unread_ends if (job_id := trial.job_id)]
        by_job = self.cluster.states([*jobs.values(), *self._idle_jobs, *unread])
        self.states = {name: by_job[job_id] for name, job_id in jobs.items() if job_id in by_job}
        alive = {job_id for job_id, state in by_job.items() if state.alive}
        self._idle_jobs = {job_id: ended for job_id, ended in self._idle_jobs.items() if job_id in alive}
        self._unread_ends = [trial for trial in self._unread_ends if trial.job_id in alive]
        due = []
        for trial in open_trials:
            if jobs.get(trial.name) in alive:
                if by_job[jobs[trial.name]].reason.startswith(HELD_BY_NODE):
                    self._cancel_held_job(trial, jobs[trial.name])
                continue
            if trial.name in jobs and trial.may_have_ended():  # since the last look at its folder
                trial.wake()
                continue
            died = self._submissions[trial.name] and trial.name not in self._not_before
            if died and not self._may_start_again(trial, now):
                continue
            if now < self._not_before.get(trial.name, 0.0):
                continue
            if self._submissions[trial.name] and not trial.has_room():
                self.troubles[trial.name] = f"{Cause.DISK_FULL}: {trial.path}"
                self._not_before[trial.name] = now + DISK_FULL_POLL
                continue
            due.append(trial)
        running = [trial for trial in open_trials if jobs.get(trial.name) in alive]
        due = [trial for trial in due if not self._assign_to_job(trial, running)]
        free_jobs = self.cluster.jobs_in_flight - len(alive)
        if len(due) > free_jobs:
            self.release_idle()  # jobs that none of these fits are in the way
            self._idle_jobs.clear()
        lead_trials = self._lead_trials(due, running)[: max(0, free_jobs)]
        if lead_trials and now >= self._refused_until:
            self._submit(lead_trials)

    def _submit(self, trials: list[FollowedTrial]) -> None:
        """Submit, or waits longer before each next try."""
        groups: dict[str, list[FollowedTrial]] = defaultdict(list)
        for trial in trials:
            nodes = self._sick_nodes | {self._failed_nodes.get(trial.name, "")}
            groups[",".join(sorted(filter(None, nodes)))].append(trial)
        for exclude, group in groups.items():
            jobs = {trial.name: trial.job() for trial in group}
            # SLURM may yet requeue what it called dead: not beside the new one
            previous_jobs = [job["id"] for name, job in jobs.items() if job and name in self.states]
            try:
                self.cluster.cancel(previous_jobs)
                for trial in group:
                    trial.clear_assigned_next()  # to its last job
                self.cluster.submit(group, exclude)
            except Exception as error:  # submitit and the file system raise their own kinds
                for trial in group:
                    if trial.job() != jobs[trial.name]:  # the site had room for this one
                        self._count_start(trial)
                    else:
                        self._failed_nodes.pop(trial.name, None)  # it may be the only node there is
                        self._sick_nodes.clear()
                self._refusal_wait = min(MAX_WAIT, 2 * self._refusal_wait + 1)
                self._refused_until = time.monotonic() + self._refusal_wait
                last_line = str(error).strip().splitlines()[-1:]
                raise OSError(
                    f"submission refused, again in {self._refusal_wait:.0f} s: {''.join(last_line)}"
                ) from error
            for trial in group:
                self._count_start(trial)
        self._refusal_wait = 0.0

    @property
    def _pack(self) -> int | None:
        """How many trials a job trains at a time; None while no job has measured that."""
        if self.cluster.pack == AUTO:
            with suppress(FileNotFoundError):
                self.cluster.pack = json.loads(pack_file(self._trials).read_text())
        return None if isinstance(self.cluster.pack, str) else self.cluster.pack

    def _lead_trials(self, due: list[FollowedTrial], running: list[FollowedTrial]) -> list[FollowedTrial]:
        """Choose the trials to submit, a job each; the others wait until they are assigned to these jobs."""
        pack = self._pack
        if pack == 1:
            return due
        if pack is None:  # one job finds out
            return [] if running else due[:1]
        places: dict[FollowedTrial, int] = {}
        for trial in due:
            lead = next((lead for lead, free in places.items() if free and lead.config.packs_with(trial.config)), None)
            if lead:
                places[lead] -= 1
            else:
                places[trial] = pack - 1
        return list(places)

    def _assign_to_job(self, trial: FollowedTrial, running: list[FollowedTrial]) -> bool:
        """Whether a job takes this one next: one that has just finished a trial or, packed, one with a place left."""
        pack = self._pack or 1
        candidates = {job_id: list(ended) for job_id, ended in self._idle_jobs.items()}
        occupied: Counter[str] = Counter()
        for other in running:
            if (job_id := other.job_id) is None:
                continue
            occupied[job_id] += 1
            if pack > 1:
                candidates.setdefault(job_id, []).append(other)
        for job_id, others in candidates.items():
            for current in others:
                fits = current.config.packs_with if pack > 1 else current.config.shares_with
                if occupied[job_id] >= pack or current.assigned_next() is not None or not fits(trial.config):
                    continue
                if current in self._idle_jobs.get(job_id, []):
                    self._idle_jobs[job_id].remove(current)
                job = current.job()
                assert job is not None  # it is one of those that run or have ended
                trial.clear_assigned_next()  # to its last job
                # Noted before it is said: a driver that is killed in between finds the trial's job gone, in the end.
                trial.record_job(job_id, Path(job["log"]), place=job["place"] + 1)
                if not current.assign_next(trial):
                    return False  # the job has just left
                running.append(trial)
                self._count_start(trial)
                return True
        return False

    def _count_start(self, trial: FollowedTrial) -> None:
        self._submissions[trial.name] += 1
        epochs, starts = self._starts.get(trial.name, (0, 0))
        epochs_now = len(trial.results())
        self._starts[trial.name] = epochs_now, 1 + (starts if epochs_now == epochs else 0)
        self._not_before.pop(trial.name, None)
        self.troubles.pop(trial.name, None)

    def _may_start_again(self, trial: FollowedTrial, now: float) -> bool:
        """Decide about a trial whose job is gone: it ends as failed, or has `_not_before` set and starts again.

        What counts are the starts since its last epoch: a job that gets on is worth another.
        """
        epochs, starts = self._starts[trial.name]
        if len(trial.results()) > epochs:
            starts = 0
        state = self.states.get(trial.name)
        kind = state.state if state else ""
        log = trial.last_log_lines(LOG_LINES)
        disk_full = [line for line in log if line.startswith(f"{Cause.DISK_FULL}: ")]
        sick = [line for line in log if line.startswith(NODE_FAILURE_PREFIX)]
        limit, cause, wait = self.cluster.max_submissions, Cause.LOST, 0.0
        if kind in FINAL_STATES:
            limit, cause = 1, FINAL_STATES[kind]
        elif disk_full:
            cause, wait = Cause.DISK_FULL, min(MAX_WAIT, 2.0**starts)  # whoever has to make room takes a while
            log = disk_full
        elif sick:
            cause, log = Cause.NODE_FAILURE, sick
            self._sick_nodes.add(sick[-1].removeprefix(NODE_FAILURE_PREFIX).partition(":")[0])
            self.troubles[trial.name] = f"has to go on elsewhere: {sick[-1]}"
        elif kind == "NODE_FAIL":
            cause = Cause.NODE_FAILURE
        elif kind in ("", "FAILED", "COMPLETED"):
            limit = min(MAX_UNEXPLAINED_STARTS, limit)
            if any(word in line.lower() for line in log for word in OUT_OF_MEMORY_WORDS):
                cause = Cause.OUT_OF_MEMORY
            if not trial.has_log():
                wait = min(MAX_WAIT, 5 * 2.0**starts)
                self.troubles[trial.name] = failure_reason(log, kind)
        if starts >= limit:
            reason = "" if kind in FINAL_STATES else f"its job ended {starts} times without a result: "
            trial.claim().end(State.FAILED, reason + failure_reason(log, kind), cause)
            trial.wake()
            return False
        if state and not sick and cause in (Cause.DISK_FULL, Cause.NODE_FAILURE):
            self._failed_nodes[trial.name] = state.node
        self._not_before[trial.name] = now + wait
        return True

    def _find_idle_jobs(self, ended: list[FollowedTrial]) -> None:
        """Find the jobs whose trial has ended and that may take another.

        A trial whose folder can't be read is left to the next time.
        """
        self._unread_ends += ended
        ended, self._unread_ends = self._unread_ends, []
        for trial in ended:
            for state in (self._submissions, self._starts, self._failed_nodes, self._not_before, self.troubles):
                state.pop(trial.name, None)
            try:
                if (job := self._job_with_free_slot(trial)) is not None:
                    self._idle_jobs.setdefault(job, []).append(trial)
            except OSError:
                self._unread_ends.append(trial)

    def _job_with_free_slot(self, ended: FollowedTrial) -> str | None:
        """Return the job of a trial that has ended, if it may take another and none was given to it. Raises OSError."""
        job = ended.job()
        if job is None or (self._pack == 1 and job["place"] >= self.cluster.trials_per_job):
            return None
        return job["id"] if ended.assigned_next() is None else None

    def release_idle(self) -> None:
        """Send jobs home that wait for a trial."""
        self._find_idle_jobs(self.scan.survey()[1])
        for ended in self._idle_jobs.values():
            for trial in ended:
                with suppress(OSError):  # a job that hears nothing leaves by itself, after a while
                    trial.assign_next(None)

    def interrupt(self, patience: float = 20.0) -> None:
        """End all jobs so that their trials can be continued.

        Jobs that wait are cancelled at once, those that run stop by themselves, or are cancelled after `patience` s.
        """
        self._interrupting = True
        with suppress(Exception):
            self.scan.poll_all()
        for trial in self.scan.open():
            with suppress(OSError):  # a full disk: its job is cancelled when it is late
                trial.stop(StopReason.INTERRUPT)
        deadline = time.monotonic() + patience
        cancelled: set[str] = set()
        while time.monotonic() < deadline + patience:
            late = time.monotonic() > deadline
            with suppress(OSError):  # the controller may be away; the jobs read their folders all the same
                self.release_idle()
                alive = self._alive_jobs()
                to_cancel = {job_id for job_id, state in alive.items() if late or state.waiting} - cancelled
                self.cluster.cancel(sorted(to_cancel))
                cancelled |= to_cancel
                if not alive:
                    break
            time.sleep(INTERRUPT_POLL)
            with suppress(Exception):
                self.scan.poll()
        with suppress(Exception):
            self.scan.poll_all()

    def _cancel_held_job(self, trial: FollowedTrial, job_id: str) -> None:
        """Cancel a job that would wait for ever; the next poll submits another, and the node is drained by SLURM."""
        self.troubles[trial.name] = f"{HELD_BY_NODE}: job {job_id} is cancelled, and another submitted"
        self.cluster.cancel([job_id])

    def _alive_jobs(self) -> dict[str, JobState]:
        jobs = [job["id"] for trial in self.scan.open() if (job := trial.job())]
        return {
            job_id: state for job_id, state in self.cluster.states([*jobs, *self._idle_jobs]).items() if state.alive
        }


def failure_reason(log: list[str], state: str) -> str:
    """Return the line of a job's log that says most of why it ended, or what the cluster says; never nothing."""
    telling = [line for line in log if any(word in line.lower() for word in TELLING_WORDS)]
    if lines := telling or log:
        return lines[-1]
    called = f" and was called {state}" if state else ""
    return f"the job wrote no log{called}: can its node see the sweep's folder?"
