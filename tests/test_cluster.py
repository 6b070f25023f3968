from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from cluster import job
from cluster.folder import End, JobState, State, StopReason, TrialFolder
from cluster.profile import Profile
from cluster.relay import UNEXPLAINED, Relay, make_cluster


@pytest.fixture
def trial(digits, tmp_path) -> TrialFolder:
    return TrialFolder.request(tmp_path / "trials", digits())


FILES = ["bundle", "checkpoint.pt", "end.json", "results.jsonl", "started.json"]


def result(epoch: int) -> dict:
    return {"epoch": epoch, "val_top1": 10.0 * epoch}


def test_equal_configs_share_a_folder(digits, tmp_path):
    first = TrialFolder.request(tmp_path, digits())
    again = TrialFolder.request(tmp_path, digits(optimizer={"prompt_lr": 0.05, "prompt_name": "adam", "lr": "0.1"}))
    other = TrialFolder.request(tmp_path, digits(init_seed=1))
    assert first.path == again.path != other.path
    assert first.config == digits()
    assert [t.name for t in TrialFolder.requested(tmp_path)] == [first.name, other.name]


def test_a_torn_last_line_is_left_out_and_written_over(trial):
    attempt = trial.claim()
    attempt.append(result(1))
    with open(attempt.path / "results.jsonl", "a") as file:
        file.write('{"epoch": 2, "val')
    assert trial.results() == [result(1)]
    attempt.append(result(2))
    assert trial.results() == [result(1), result(2)]


def test_a_newer_attempt_fences_the_older_one(trial):
    first = trial.claim()
    first.append(result(1))
    first.checkpoint.write_bytes(b"epoch 1")
    second = trial.claim()
    assert first.fenced()
    assert not second.fenced()
    assert second.results() == [result(1)]
    assert second.checkpoint.read_bytes() == b"epoch 1"
    first.append(result(99))
    first.end(State.FAILED, "stale")
    assert trial.results() == [result(1)]
    assert trial.ended() is None
    second.end(State.FINISHED)
    assert trial.ended() == End(State.FINISHED, "")


def test_attempts_claimed_at_once_get_numbers_of_their_own(trial):
    claimed = []
    threads = [threading.Thread(target=lambda: claimed.append(trial.claim())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(a.path.name for a in claimed) == [f"{n:04}" for n in range(1, 9)]
    assert sum(not a.fenced() for a in claimed) == 1
    assert not [name for name in os.listdir(trial.path / "attempts") if name.startswith(".")]


def test_the_job_trains_records_and_ends(trial):
    job.run(trial.path, threads=1)
    assert [r["epoch"] for r in trial.results()] == [1, 2, 3]
    assert trial.ended() == End(State.FINISHED, "")
    attempt = trial.newest()
    assert sorted(p.name for p in attempt.path.iterdir()) == FILES


def test_the_job_goes_on_where_the_last_attempt_was(trial, monkeypatch):
    from cluster.folder import Attempt

    append = Attempt.append

    def die(self, values):
        append(self, values)
        if values["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "append", die)
        with pytest.raises(KeyboardInterrupt):
            job.run(trial.path, threads=1)
    before = trial.results()
    assert trial.ended() is None
    job.run(trial.path, threads=1)
    assert trial.results()[:2] == before
    assert [r["epoch"] for r in trial.results()] == [1, 2, 3]
    assert trial.ended().state == State.FINISHED


def test_the_search_stops_a_job_for_good_an_interrupt_does_not(trial):
    trial.stop(StopReason.INTERRUPT)
    job.run(trial.path, threads=1)
    assert trial.ended() is None
    trial.clear_stop()
    trial.stop(StopReason.SEARCH)
    trial.stop(StopReason.INTERRUPT)  # the first reason stays
    job.run(trial.path, threads=1)
    assert trial.ended() == End(State.STOPPED, "")
    assert trial.results() == []


def test_a_job_that_is_fenced_says_no_more(trial, monkeypatch):
    from cluster.folder import Attempt

    append = Attempt.append

    def overtaken(self, values):
        append(self, values)
        monkeypatch.undo()
        trial.claim()

    monkeypatch.setattr(Attempt, "append", overtaken)
    job.run(trial.path, threads=1)
    assert [r["epoch"] for r in trial.newest().results()] == [1]
    assert trial.ended() is None


def test_failures_are_recorded_with_their_reason(digits, tmp_path):
    diverging = TrialFolder.request(tmp_path, digits(optimizer={"lr": 1e30, "prompt_lr": 1e30, "prompt_name": "sgd"}))
    with pytest.raises(Exception, match="nan"):
        job.run(diverging.path, threads=1)
    assert diverging.ended() == End(State.FAILED, "train loss is nan in epoch 1")
    missing = TrialFolder.request(tmp_path, digits(dataset={"name": "image_folder", "root": tmp_path / "none"}))
    with pytest.raises(Exception, match="no such folder"):
        job.run(missing.path, threads=1)
    assert "no such folder" in missing.ended().reason


def local_relay(sweep: Path) -> Relay:
    """A relay for one job at a time on this machine."""
    return Relay(sweep / "trials", make_cluster(Profile(kind="local"), sweep, "", concurrent=1))


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_local_jobs_die_are_submitted_again_and_finish(digits, tmp_path):
    trial = TrialFolder.request(tmp_path / "trials", digits(epochs=30))
    relay = local_relay(tmp_path)
    relay.poll()
    wait_until(lambda: len(trial.results()) >= 2)
    first_job = trial.job()["id"]
    assert relay.cluster.states([first_job])[first_job].alive
    for process in [psutil.Process(int(first_job)), *psutil.Process(int(first_job)).children()]:
        process.kill()
    wait_until(lambda: not relay.cluster.states([first_job]))
    recorded = trial.results()
    another_driver = local_relay(tmp_path)
    another_driver.poll()
    assert trial.job()["id"] != first_job
    wait_until(lambda: trial.newest().path.name == "0002" and len(trial.results()) > len(recorded) + 1)
    assert trial.results()[: len(recorded)] == recorded
    trial.stop(StopReason.SEARCH)
    start = time.monotonic()
    wait_until(lambda: trial.ended() is not None)
    assert time.monotonic() - start < 3
    assert trial.ended().state == State.STOPPED
    assert trial.newest().bundle.is_dir()
    assert another_driver.open_trials() == []


@pytest.mark.slow
def test_an_interrupt_leaves_trials_that_can_be_continued(digits, tmp_path):
    trial = TrialFolder.request(tmp_path / "trials", digits(epochs=30))
    waiting = TrialFolder.request(tmp_path / "trials", digits(epochs=29))
    relay = local_relay(tmp_path)
    relay.poll()
    relay.poll()
    assert waiting.job() is None  # one job at a time
    wait_until(lambda: trial.results())
    relay.interrupt()
    assert relay.cluster.states([trial.job()["id"]]) == {}
    assert trial.ended() is None
    relay.poll()
    assert trial.job()["submissions"] == 1  # this driver is ending
    assert waiting.job() is None


@pytest.mark.slow
def test_jobs_run_the_code_as_it_was_when_the_sweep_started(digits, tmp_path):
    trial = TrialFolder.request(tmp_path / "trials", digits(epochs=1))
    local_relay(tmp_path)
    job_file = tmp_path / "code" / "cluster" / "job.py"
    job_file.write_text(job_file.read_text().replace("epoch {result.epoch}", "epoch of the copy {result.epoch}"))
    later_driver = local_relay(tmp_path)
    later_driver.poll()
    wait_until(trial.ended)
    assert trial.ended().state == State.FINISHED
    assert "epoch of the copy 1" in Path(trial.job()["log"]).read_text()


class DeadCluster:
    """Jobs that die before they have said a word."""

    jobs_in_flight = 4
    max_submissions = 10

    def __init__(self, log: Path, state: JobState | None) -> None:
        self.log, self.state = log, state
        log.write_text("slurmstepd: error: Detected 1 oom_kill event\n")

    def submit(self, trials):
        for trial in trials:
            trial.submitted("1", self.log)

    def adopt(self, trials):
        pass

    def states(self, job_ids):
        return {job_id: self.state for job_id in job_ids if self.state}

    def cancel(self, job_ids):
        raise AssertionError


@pytest.mark.parametrize(
    ("state", "submissions", "reason"),
    [
        (None, UNEXPLAINED, "3 times without a result: slurmstepd: error: Detected 1 oom_kill event"),
        ("FAILED", UNEXPLAINED, "3 times without a result"),
        ("OUT_OF_MEMORY", 1, "out of memory: slurmstepd"),
        ("TIMEOUT", DeadCluster.max_submissions, "10 times without a result"),
        ("NODE_FAIL", DeadCluster.max_submissions, "10 times"),
    ],
)
def test_a_job_that_dies_every_time_is_given_up(trial, tmp_path, state, submissions, reason):
    relay = Relay(trial.path.parent, DeadCluster(tmp_path / "log", JobState(state) if state else None))
    for _ in range(submissions):
        assert trial.ended() is None
        relay.poll()
    relay.poll()
    assert trial.job()["submissions"] == submissions
    assert trial.ended().state == State.FAILED
    assert reason in trial.ended().reason


def test_a_refused_submission_is_tried_again_later(trial, tmp_path, monkeypatch):
    cluster = DeadCluster(tmp_path / "log", None)
    relay = Relay(trial.path.parent, cluster)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    tries = []

    def refuse(trials):
        tries.append(clock[0])
        raise RuntimeError("sbatch: error: QOSMaxSubmitJobPerUserLimit")

    with monkeypatch.context() as patch:
        patch.setattr(cluster, "submit", refuse)
        for clock[0] in range(20):
            try:
                relay.poll()
            except OSError as error:
                assert "QOSMaxSubmitJobPerUserLimit" in str(error)  # noqa: PT017  each refusal is told
    assert tries == [0, 1, 4, 11]
    clock[0] = 100
    relay.poll()
    assert trial.job()["submissions"] == 1


def test_results_are_files_that_a_person_can_read(trial):
    job.run(trial.path, threads=1)
    line = Path(trial.newest().path / "results.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["epoch"] == 1
