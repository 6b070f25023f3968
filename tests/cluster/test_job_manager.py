"""The job manager, on a cluster that does what a test wants, and with jobs on this machine, held at points."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from support.holds import Holds
from support.stale import Stale
from support.waiting import wait_for

from cluster import job
from cluster.base import make_cluster
from cluster.job_manager import MAX_UNEXPLAINED_STARTS, JobManager
from cluster.profile import Profile
from cluster.scan import STALE_SECONDS
from cluster.trial_folder import Cause, JobState, State, StopReason, TrialFolder, pack_file


@pytest.fixture
def trial(digits, tmp_path) -> TrialFolder:
    return TrialFolder.request(tmp_path / "trials", digits())


@pytest.fixture
def holds(tmp_path, monkeypatch) -> Holds:
    """On the jobs that this test starts itself."""
    holds = Holds(tmp_path / "of_the_test")
    for name, value in holds.environment().items():
        monkeypatch.setenv(name, value)
    return holds


class DeadCluster:
    """Jobs that die before they have said a word."""

    jobs_in_flight = 4
    trials_per_job = 1
    pack = 1
    max_submissions = 10

    def __init__(self, log: Path, state: JobState | None) -> None:
        self.log, self.state = log, state
        log.write_text("slurmstepd: error: Detected 1 oom_kill event\n")

    def submit(self, trials, exclude):
        self.excluded = exclude
        for trial in trials:
            trial.record_job("1", self.log)

    def adopt(self, trials):
        pass

    def states(self, job_ids):
        return {job_id: self.state for job_id in job_ids if self.state}

    def cancel(self, job_ids):
        assert self.state or not job_ids


@pytest.mark.parametrize(
    ("state", "submissions", "reason"),
    [
        (
            None,
            MAX_UNEXPLAINED_STARTS,
            "out of memory: its job ended 3 times without a result: slurmstepd: error: Detected 1 oom",
        ),
        ("FAILED", MAX_UNEXPLAINED_STARTS, "3 times without a result"),
        ("OUT_OF_MEMORY", 1, "out of memory: slurmstepd"),
        ("TIMEOUT", DeadCluster.max_submissions, "job lost: its job ended 10 times without a result"),
        ("NODE_FAIL", DeadCluster.max_submissions, "node failure: its job ended 10 times"),
    ],
)
def test_a_job_that_dies_every_time_is_given_up(trial, tmp_path, state, submissions, reason):
    cluster = DeadCluster(tmp_path / "log", JobState(state, node="node7") if state else None)
    manager = JobManager(trial.path.parent, cluster)
    for _ in range(submissions):
        assert trial.ended() is None
        manager.poll()
    manager.poll()
    assert trial.job()["submissions"] == submissions
    assert trial.ended().state == State.FAILED
    assert reason in str(trial.ended())
    assert cluster.excluded == ("node7" if state == "NODE_FAIL" else "")


def test_a_job_that_gets_on_between_its_ends_is_submitted_as_often_as_it_takes(trial, tmp_path):
    """Each start trains an epoch, then its python is killed, or the site's limit ends a job that may not requeue."""
    cluster = DeadCluster(tmp_path / "log", JobState("FAILED"))
    manager = JobManager(trial.path.parent, cluster)
    for epoch in range(1, 3 * MAX_UNEXPLAINED_STARTS):
        manager.poll()
        trial.claim().append({"epoch": epoch, "seconds": 1.0})
        manager.scan.poll_all()
    assert trial.ended() is None
    for _ in range(MAX_UNEXPLAINED_STARTS + 1):
        manager.poll()
    assert trial.ended().cause == Cause.OUT_OF_MEMORY


def test_a_job_that_finds_its_node_out_of_order_runs_elsewhere(trial, tmp_path):
    """So do other trials from then on, until the site refuses to do without that node."""
    cluster = DeadCluster(tmp_path / "log", JobState("FAILED"))
    manager = JobManager(trial.path.parent, cluster)
    manager.poll()
    assert cluster.excluded == ""
    cluster.log.write_text("on Quadro RTX 8000, fp16\nnode failure on gpu7: CUDA error: uncorrectable ECC error\n")
    manager.poll()
    assert cluster.excluded == "gpu7"
    cluster.log.write_text("node failure on gpu8: the job was given a GPU, and torch can use none\n")
    manager.poll()
    assert cluster.excluded == "gpu7,gpu8"
    assert trial.ended() is None
    for _ in range(DeadCluster.max_submissions):
        manager.poll()
    assert trial.ended().cause == Cause.NODE_FAILURE
    assert "node failure on gpu8: the job was given a GPU" in trial.ended().reason


def test_a_job_without_the_gpu_that_it_was_given_does_not_train(trial, tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu7")
    with pytest.raises(SystemExit) as ended:
        job.TrialJob()(trial.path, 1, 1, 1, job.ANY_GPU)
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert said.startswith("node failure on gpu7: the job was given a GPU, and torch ")
    assert trial.ended() is None
    assert not trial.results()


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "epoch 1\nslurmstepd: error: Detected 1 oom_kill event in StepId=7.0\nsrun: error: node1: task 0\n",
            "oom_kill",
        ),
        ("bash: line 1: 7 Killed  python\nsrun: error\n", "Killed"),
        ("python: error while loading libcuda.so.1: cannot open shared object file\nsrun: error\n", "libcuda"),
        ("env: '/data/venv/bin/python': No such file or directory\nsrun: error\n", "/data/venv/bin/python"),
        ("the last line\n", "the last line"),
        ("", "the job wrote no log and was called FAILED: can its node see the sweep's folder?"),
    ],
)
def test_what_the_log_says_is_the_reason(trial, tmp_path, log, reason):
    cluster = DeadCluster(tmp_path / "log", JobState("FAILED"))
    cluster.log.write_text(log)
    manager = JobManager(trial.path.parent, cluster)
    for _ in range(MAX_UNEXPLAINED_STARTS + 1):
        manager.poll()
    assert reason in trial.ended().reason


def test_a_folder_that_nodes_do_not_see_is_told_after_the_first_job(trial, tmp_path):
    cluster = DeadCluster(tmp_path / "log", JobState("FAILED"))
    cluster.log.unlink()
    manager = JobManager(trial.path.parent, cluster)
    manager.poll()
    manager.poll()
    assert manager.troubles == {
        trial.name: "the job wrote no log and was called FAILED: can its node see the sweep's folder?"
    }


def test_a_refused_submission_is_tried_again_later(trial, tmp_path, monkeypatch):
    cluster = DeadCluster(tmp_path / "log", None)
    manager = JobManager(trial.path.parent, cluster)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    tries = []

    def refuse(trials, exclude):
        tries.append(clock[0])
        raise RuntimeError("sbatch: error: QOSMaxSubmitJobPerUserLimit")

    with monkeypatch.context() as patch:
        patch.setattr(cluster, "submit", refuse)
        for clock[0] in range(20):
            try:
                manager.poll()
            except OSError as error:
                assert "QOSMaxSubmitJobPerUserLimit" in str(error)  # noqa: PT017  each refusal is told
    assert tries == [0, 1, 4, 11]
    clock[0] = 100
    manager.poll()
    assert trial.job()["submissions"] == 1


class HoldingCluster(DeadCluster):
    """Jobs that live as long as one wants them to."""

    pack: int | str = 3

    def submit(self, trials, exclude):
        for trial in trials:
            trial.record_job(f"job-{trial.name}", self.log)


def test_the_job_manager_packs_trials_that_fit(digits, tmp_path):
    """Four and a different one by jobs of three places; a place that gets free goes to the next that fits."""
    cluster = HoldingCluster(tmp_path / "log", JobState("RUNNING"))
    configs = [digits(init_seed=seed) for seed in range(4)] + [digits(batch_size=16)]
    trials = [TrialFolder.request(tmp_path / "trials", config) for config in configs]
    manager = JobManager(tmp_path / "trials", cluster)
    for _ in range(3):
        manager.poll()
    jobs = [trial.job()["id"] for trial in trials]
    assert jobs[0] == jobs[1] == jobs[2]
    assert len(set(jobs)) == 3
    trials[1].claim().end(State.STOPPED)
    manager.scan.poll_all()
    joins = manager.scan.request(digits(init_seed=9))
    manager.poll()
    assert joins.job()["id"] in (jobs[0], jobs[3])
    assert {trial.name for trial in job.job_trials(trials[0])} >= {trial.name for trial in trials[:3]}


def test_a_packed_job_that_died_comes_back_packed(digits, tmp_path):
    cluster = HoldingCluster(tmp_path / "log", JobState("RUNNING"))
    trials = [TrialFolder.request(tmp_path / "trials", digits(init_seed=seed)) for seed in range(3)]
    manager = JobManager(tmp_path / "trials", cluster)

    def polls() -> set[str]:
        for _ in range(4):
            manager.poll()
        return {trial.job()["id"] for trial in trials}

    (first,) = polls()
    assert first == f"job-{trials[0].name}"
    cluster.submit = lambda trials, exclude: [trial.record_job(f"again-{trial.name}", cluster.log) for trial in trials]
    cluster.states = lambda ids: {job_id: JobState("RUNNING" if "again" in job_id else "NODE_FAIL") for job_id in ids}
    (second,) = polls()
    assert second == f"again-{trials[0].name}"
    assert {trial.name for trial in job.job_trials(trials[0])} == {trial.name for trial in trials}


def test_a_job_is_sent_home_when_its_last_trial_has_ended(digits, tmp_path):
    """Also when nobody has polled since: at a sweep's end."""
    cluster = HoldingCluster(tmp_path / "log", JobState("RUNNING"))
    cluster.pack, cluster.trials_per_job = 1, 8
    trial = TrialFolder.request(tmp_path / "trials", digits())
    manager = JobManager(tmp_path / "trials", cluster)
    manager.poll()
    trial.claim().end(State.FINISHED)
    manager.scan.poll_all()
    assert trial.assigned_next() is None
    manager.release_idle()
    assert trial.assigned_next() == ""


def test_a_folder_that_can_not_be_read_costs_the_others_no_job(digits, tmp_path, monkeypatch):
    """Of two jobs that are free at once the one is handed a trial, the other one later; nor is there a third job."""
    cluster = HoldingCluster(tmp_path / "log", JobState("RUNNING"))
    cluster.pack, cluster.trials_per_job, cluster.jobs_in_flight = 1, 8, 2
    trials = [TrialFolder.request(tmp_path / "trials", digits(init_seed=seed)) for seed in range(2)]
    manager = JobManager(tmp_path / "trials", cluster)
    manager.poll()
    for trial in trials:
        trial.claim().end(State.FINISHED)
    manager.scan.poll_all()
    read, gave = TrialFolder.assigned_next, TrialFolder.assign_next

    def stale(self, *following):
        if self.name == trials[0].name:
            raise OSError(116, "Stale file handle")
        return gave(self, *following) if following else read(self)

    later = [manager.scan.request(digits(init_seed=seed)) for seed in (7, 8)]
    with monkeypatch.context() as patch:
        patch.setattr(TrialFolder, "assigned_next", stale)
        manager.poll()
        assert [trial.job_id for trial in later] == [trials[1].job_id, None]
    manager.poll()
    assert later[1].job_id == trials[0].job_id
    for trial in later:
        trial.claim().end(State.FINISHED)
    manager.scan.poll_all()
    with monkeypatch.context() as patch:
        patch.setattr(TrialFolder, "assign_next", stale)
        trials[0] = later[0]
        manager.release_idle()
    assert later[1].assigned_next() == ""


def test_one_job_measures_before_others_start(digits, tmp_path):
    cluster = HoldingCluster(tmp_path / "log", JobState("RUNNING"))
    cluster.pack = "auto"
    trials = [TrialFolder.request(tmp_path / "trials", digits(init_seed=seed)) for seed in range(4)]
    manager = JobManager(tmp_path / "trials", cluster)
    for _ in range(3):
        manager.poll()
    assert [trial.job() is not None for trial in trials] == [True, False, False, False]
    pack_file(tmp_path / "trials").write_text("2")
    for _ in range(3):
        manager.poll()
    jobs = [trial.job()["id"] for trial in trials]
    assert jobs[0] == jobs[1]
    assert jobs[2] == jobs[3] != jobs[0]


def with_running_job(tmp_path, monkeypatch) -> tuple[list[float], HoldingCluster, JobManager]:
    """A job manager that has submitted the trial's job, which runs; and the clock, in seconds, that a test sets."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    cluster = HoldingCluster(tmp_path / "log", JobState("RUNNING"))
    cluster.pack = 1
    manager = JobManager(tmp_path / "trials", cluster)
    manager.poll()
    return clock, cluster, manager


@pytest.mark.parametrize("late", ["attempts/0001", "attempts/0001/end.json"])
@pytest.mark.parametrize("until_listed", [True, False])
def test_an_end_that_a_network_disk_does_not_show_yet_starts_no_second_job(
    trial, tmp_path, monkeypatch, late, until_listed
):
    clock, cluster, manager = with_running_job(tmp_path, monkeypatch)
    trial.claim().append({"epoch": 1, "seconds": 1.0})
    manager.scan.poll_all()
    trial.newest().end(State.FINISHED)
    cluster.state = JobState("COMPLETED")
    stale = Stale(monkeypatch, until_listed)
    stale.hide(trial.path / late)
    for _ in range(4):
        manager.poll()
        clock[0] += STALE_SECONDS / 5
        assert trial.job()["submissions"] == 1
    stale.show()
    manager.scan.poll()
    manager.poll()
    assert trial.job()["submissions"] == 1
    assert manager.scan.open() == []


def test_an_end_that_never_shows_is_not_waited_for(trial, tmp_path, monkeypatch):
    clock, cluster, manager = with_running_job(tmp_path, monkeypatch)
    trial.claim().end(State.FINISHED)
    (trial.newest().path / "end.json").unlink()
    cluster.state = JobState("NODE_FAIL")
    manager.poll()
    assert trial.job()["submissions"] == 1
    clock[0] += STALE_SECONDS
    manager.poll()
    assert trial.job()["submissions"] == 2


def test_a_full_disk_is_waited_for(trial, tmp_path, monkeypatch):
    """Not a start is wasted while there is no room; then the trial starts again, elsewhere."""
    cluster = DeadCluster(tmp_path / "log", JobState("FAILED", node="node7"))
    cluster.log.write_text("disk full: [Errno 28] No space left on device\nsubmitit ERROR\n")
    manager = JobManager(trial.path.parent, cluster)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    manager.poll()
    with monkeypatch.context() as patch:
        patch.setattr(TrialFolder, "has_room", lambda self: False)
        for clock[0] in range(1, 60):
            manager.poll()
    assert trial.job()["submissions"] == 1
    assert manager.troubles == {trial.name: f"disk full: {trial.path}"}
    clock[0] = 100.0
    manager.poll()
    assert trial.job()["submissions"] == 2
    assert cluster.excluded == "node7"
    assert manager.troubles == {}


def local_manager(sweep: Path) -> JobManager:
    """A job manager for one job at a time on this machine."""
    return JobManager(sweep / "trials", make_cluster(Profile(kind="local"), sweep, "", concurrent=1))


@pytest.mark.slow
def test_local_jobs_die_are_submitted_again_and_finish(trial, tmp_path, holds):
    """The next one goes on; a word of the search ends it in its step."""
    step = holds.hold("step", epoch=2, step=2)
    manager = local_manager(tmp_path)
    manager.poll()
    step.reached()
    first_job = trial.job_id
    assert manager.cluster.states([first_job])[first_job].alive
    for process in [psutil.Process(int(first_job)), *psutil.Process(int(first_job)).children()]:
        process.kill()
    wait_for("end of the job", lambda: not manager.cluster.states([first_job]))
    before = trial.results()
    assert len(before) == 1
    step.release()
    step = holds.hold("step", epoch=3, step=2)
    another_driver = local_manager(tmp_path)
    another_driver.poll()
    assert trial.job_id != first_job
    (held,) = step.reached()
    assert held.attempt == "0002"
    assert trial.results()[:1] == before
    trial.stop(StopReason.SEARCH)
    step.release()
    wait_for("end of the trial", trial.ended)
    assert trial.ended().state == State.STOPPED
    assert len(trial.results()) == 2
    assert trial.newest().bundle.is_dir()
    another_driver.scan.poll_all()
    assert another_driver.scan.open() == []


@pytest.mark.slow
def test_an_interrupt_leaves_trials_that_can_be_continued(digits, trial, tmp_path, holds):
    waiting = TrialFolder.request(tmp_path / "trials", digits(epochs=2))
    step = holds.hold("step", epoch=2)
    manager = local_manager(tmp_path)
    manager.poll()
    manager.poll()
    assert waiting.job() is None  # one job at a time
    step.reached()
    interrupt = threading.Thread(target=manager.interrupt)
    interrupt.start()
    wait_for("word to stop", trial.stop_reason)
    step.release()
    interrupt.join()
    assert manager.cluster.states([trial.job_id]) == {}
    assert trial.ended() is None
    assert len(trial.results()) == 1
    manager.poll()
    assert trial.job()["submissions"] == 1  # this driver is ending
    assert waiting.job() is None


@pytest.mark.slow
def test_jobs_run_the_code_as_it_was_when_the_sweep_started(digits, tmp_path):
    trial = TrialFolder.request(tmp_path / "trials", digits(epochs=1))
    local_manager(tmp_path)
    job_file = tmp_path / "code" / "cluster" / "job.py"
    job_file.write_text(job_file.read_text().replace("epoch {result.epoch}", "epoch of the copy {result.epoch}"))
    later_driver = local_manager(tmp_path)
    later_driver.poll()
    wait_for("end of the trial", trial.ended)
    assert trial.ended().state == State.FINISHED
    assert "epoch of the copy 1" in Path(trial.job()["log"]).read_text()


@pytest.mark.slow
def test_jobs_import_modules_of_the_user(trial, tmp_path, monkeypatch):
    """By PYTHONPATH, after the sweep's copy of the code."""
    (tmp_path / "own modules").mkdir()
    (tmp_path / "own modules" / "sitecustomize.py").write_text("print('from the own module')")
    (tmp_path / "own modules" / "lorvp.py").write_text("raise AssertionError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "own modules"))
    local_manager(tmp_path).poll()
    wait_for("end of the trial", trial.ended)
    assert trial.ended().state == State.FINISHED
    assert "from the own module" in Path(trial.job()["log"]).read_text()


@pytest.mark.slow
def test_the_job_manager_hands_trials_over(digits, tmp_path, holds):
    """Two by one job, since they fit, a third by the next; one with other data by a job of its own."""
    holds.set("cluster.job.NEXT_TRIAL_SECONDS", 300.0)
    configs = [digits(epochs=1, init_seed=seed) for seed in range(3)]
    configs.append(digits(epochs=1, dataset={"name": "digits", "max_per_class": 10}))
    trials = [TrialFolder.request(tmp_path / "trials", config) for config in configs]
    cluster = make_cluster(Profile(kind="local", trials_per_job=2), tmp_path, "", concurrent=1)
    manager = JobManager(tmp_path / "trials", cluster)

    def all_ended() -> bool:
        manager.scan.poll_all()
        manager.poll()
        return all(trial.ended() for trial in trials)

    wait_for("end of the trials", all_ended)
    jobs = [trial.job() for trial in trials]
    assert jobs[0]["id"] == jobs[1]["id"]
    assert len({each["id"] for each in jobs}) == 3
    assert [each["place"] for each in jobs] == [1, 2, 1, 1]
    log = Path(jobs[1]["log"]).read_text()
    assert log.index(trials[0].name) < log.index(trials[1].name)
    manager.poll()  # sees that the last one's job is free
    manager.release_idle()
    wait_for("end of the job that waits", lambda: not cluster.states([jobs[3]["id"]]))
