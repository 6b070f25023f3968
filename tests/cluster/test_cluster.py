"""A trial's folder, and the job that trains it, in this process."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cluster import job, local
from cluster.local import LocalCluster
from cluster.profile import Profile
from cluster.trial_folder import Cause, End, JobState, State, StopReason, TrialFolder, pack_file
from lorvp.errors import TrialFailed, UserError
from lorvp.training import precision
from lorvp.utils.device import NoGpu
from sweeps.run import status


@pytest.fixture
def trial(digits, tmp_path) -> TrialFolder:
    return TrialFolder.request(tmp_path / "trials", digits())


FILES = ["bundle", "checkpoint.pt", "end.json", "predictions.parquet", "results.jsonl", "started.json"]


def result(epoch: int) -> dict:
    return {"epoch": epoch, "val_top1": 10.0 * epoch}


def test_equal_configs_share_a_folder(digits, tmp_path):
    first = TrialFolder.request(tmp_path, digits())
    again = TrialFolder.request(tmp_path, digits(prompt={"lr": 0.05, "optimizer": "adam"}, optimizer={"lr": "0.1"}))
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
    from cluster.trial_folder import Attempt

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
    from cluster.trial_folder import Attempt

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
    diverging = TrialFolder.request(tmp_path, digits(prompt={"lr": 1e30, "optimizer": "sgd"}, optimizer={"lr": 1e30}))
    with pytest.raises(Exception, match="nan"):
        job.run(diverging.path, threads=1)
    assert diverging.ended() == End(State.FAILED, "train loss is nan in epoch 1", Cause.DIVERGED)
    missing = TrialFolder.request(tmp_path, digits(dataset={"name": "image_folder", "root": tmp_path / "none"}))
    with pytest.raises(Exception, match="no such folder"):
        job.run(missing.path, threads=1)
    assert "no such folder" in missing.ended().reason
    assert missing.ended().cause == Cause.BAD_INPUT


def test_results_are_files_that_a_person_can_read(trial):
    job.run(trial.path, threads=1)
    line = Path(trial.newest().path / "results.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["epoch"] == 1


def test_a_job_takes_the_trials_that_it_is_handed(digits, tmp_path):
    """Three trials in one process, each with the results that it has alone; a restarted job finds where it was."""
    trials = [TrialFolder.request(tmp_path / "trials", digits(epochs=1, init_seed=seed)) for seed in range(4)]
    for place, trial in enumerate(trials[:3], start=1):
        trial.record_job("7", tmp_path / "log", place)
        if place > 1:
            assert trials[place - 2].assign_next(trial)
    trials[3].record_job("8", tmp_path / "log")
    trials[2].assign_next(trials[3])  # given to another job meanwhile
    job.run(trials[0].path, threads=1, trials=9)
    assert [t.ended() for t in trials] == [End(State.FINISHED)] * 3 + [None]
    alone = TrialFolder.request(tmp_path / "alone", trials[2].config)
    job.run(alone.path, threads=1)
    assert alone.results()[0]["val_loss"] == trials[2].results()[0]["val_loss"]
    job.run(trials[0].path, threads=1, trials=9)
    assert all(t.newest().path.name == "0001" for t in trials[:3])


def test_a_job_that_is_handed_nothing_leaves(trial, monkeypatch):
    monkeypatch.setattr(job, "NEXT_TRIAL_SECONDS", 0.3)
    job.run(trial.path, threads=1, trials=2)
    assert not trial.assign_next(TrialFolder(trial.path.parent / "late"))
    assert trial.assigned_next() == ""


def test_a_trial_that_diverges_does_not_end_its_job_others_do(digits, tmp_path):
    diverging = digits(prompt={"lr": 1e30, "optimizer": "sgd"}, optimizer={"lr": 1e30})
    first, second = (TrialFolder.request(tmp_path / "trials", config) for config in (diverging, digits(epochs=1)))
    for place, trial in enumerate((first, second), start=1):
        trial.record_job("7", tmp_path / "log", place)
    first.assign_next(second)
    with pytest.raises(TrialFailed):
        job.run(first.path, threads=1, trials=2)
    assert (first.ended().state, second.ended().state) == (State.FAILED, State.FINISHED)
    missing = digits(dataset={"name": "image_folder", "root": tmp_path / "none"})
    broken = TrialFolder.request(tmp_path / "trials", missing)
    with pytest.raises(UserError):
        job.run(broken.path, threads=1, trials=2)
    assert broken.assigned_next() == ""


def packed_jobs(trials: list[TrialFolder]) -> None:
    """Hands each of `trials` over to the job of the first."""
    log = trials[0].path.parent / "log"
    for place, trial in enumerate(trials, start=1):
        trial.record_job("7", log, place)
    for trial, following in pairwise(trials):
        assert trial.assign_next(following)


def test_a_packed_job_trains_its_trials_together(digits, tmp_path, monkeypatch):
    """Each with the results that it has alone; one that fails, and one that was given up, end by themselves."""
    monkeypatch.setattr(job, "NEXT_TRIAL_SECONDS", 0.3)
    diverging = digits(prompt={"lr": 1e30, "optimizer": "sgd"}, optimizer={"lr": 1e30})
    configs = [digits(head={"kind": "fm"}), diverging, digits(init_seed=1), digits(init_seed=2)]
    trials = [TrialFolder.request(tmp_path / "trials", config) for config in configs]
    packed_jobs(trials)
    trials[3].stop(StopReason.SEARCH)
    with pytest.raises(TrialFailed):
        job.run(trials[0].path, threads=1, pack=4)
    states = [trial.ended().state for trial in trials]
    assert states == [State.FINISHED, State.FAILED, State.FINISHED, State.STOPPED]
    assert trials[1].ended().cause == Cause.DIVERGED
    assert [result["packed"] for result in trials[0].results()] == [4, 2, 2]
    alone = TrialFolder.request(tmp_path / "alone", configs[2])
    job.run(alone.path, threads=1)
    for ours, by_itself in zip(trials[2].results(), alone.results(), strict=True):
        assert (ours["val_loss"], ours["train_loss"]) == (by_itself["val_loss"], by_itself["train_loss"])
    assert not trials[3].assign_next(trials[0])  # it has left


def test_a_packed_job_that_is_started_again_goes_on_with_all(digits, tmp_path, monkeypatch):
    """One of them has another job by now."""
    monkeypatch.setattr(job, "NEXT_TRIAL_SECONDS", 0.3)
    trials = [TrialFolder.request(tmp_path / "trials", digits(init_seed=seed)) for seed in range(3)]
    packed_jobs(trials)
    for trial in trials:
        trial.stop(StopReason.INTERRUPT)
    job.run(trials[0].path, threads=1, pack=3)
    assert not any(trial.ended() for trial in trials)
    for trial in trials:
        trial.clear_stop()
        (trial.path / "next").write_text("") if trial is trials[2] else None
    trials[2].record_job("8", tmp_path / "log")
    job.run(trials[0].path, threads=1, pack=3)
    assert [trial.ended() is not None for trial in trials] == [True, True, False]


def test_how_many_to_pack_is_measured_once(digits, tmp_path, monkeypatch):
    from lorvp.training import loop

    monkeypatch.setattr(job, "NEXT_TRIAL_SECONDS", 0.1)
    asked = []
    monkeypatch.setattr(loop, "best_pack", lambda config, loaded: asked.append(1) or 4)
    for seed in range(2):
        trial = TrialFolder.request(tmp_path / "trials", digits(epochs=1, init_seed=seed))
        trial.record_job("7", tmp_path / "log")
        job.run(trial.path, threads=1, pack="auto")
        assert trial.ended().state == State.FINISHED
    assert json.loads(pack_file(tmp_path / "trials").read_text()) == 4
    assert asked == [1]


@pytest.mark.parametrize(
    ("seconds", "best"),
    [({1: 1.0, 2: 1.0, 4: 1.5, 8: 3.0}, 4), ({1: 1.0, 2: 1.95}, 1), ({1: 1.0, 2: 1.1, 4: 2.1}, 2)],
)
def test_packing_is_found_to_pay_or_not(digits, monkeypatch, seconds, best):
    """By a clock that says how long the steps of so many trials take."""
    from lorvp.training import loop

    begun: list[loop.Trainer] = []
    readings: list[float] = []

    def begin(self: loop.Trainer, shuffle_epoch: int) -> None:
        begun.append(self)
        original(self, shuffle_epoch)

    def now(device: torch.device) -> float:
        readings.append(0.0 if len(readings) % 2 == 0 else seconds[len(begun)])
        if readings[-1]:
            begun.clear()
        return readings[-1]

    original = loop.Trainer.start_epoch
    monkeypatch.setattr(loop.Trainer, "start_epoch", begin)
    monkeypatch.setattr(loop, "_now", now)
    assert loop.best_pack(digits(), loop.load(digits()), steps=1) == best


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (TrialFailed("train loss is nan"), Cause.DIVERGED),
        (UserError("no such file"), Cause.BAD_INPUT),
        (torch.OutOfMemoryError("CUDA out of memory"), Cause.OUT_OF_MEMORY),
        (MemoryError(), Cause.OUT_OF_MEMORY),
        (torch.AcceleratorError("CUDA error: out of memory"), Cause.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), Cause.OUT_OF_MEMORY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), Cause.OUT_OF_MEMORY),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            Cause.OUT_OF_MEMORY,
        ),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), Cause.NODE_FAILURE),
        (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), Cause.NODE_FAILURE),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), Cause.NODE_FAILURE),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp, ncclSystemError: System call failed"), Cause.NODE_FAILURE),
        (NoGpu("the job was given a GPU"), Cause.NODE_FAILURE),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), Cause.EXCEPTION),
        (OSError(errno.ENOSPC, "No space left on device"), Cause.DISK_FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Cause.DISK_FULL),
        (RuntimeError("[enforce fail at inline_container.cc] . Disk quota exceeded"), Cause.DISK_FULL),
        (RuntimeError("shapes"), Cause.EXCEPTION),
    ],
)
def test_failures_are_told_apart(error, cause):
    assert job.cause_of(error) == cause


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("GPU-8a3c, GPU-77de", ["GPU-8a3c", "GPU-77de"]),
        ("MIG-1f,MIG-2f", ["MIG-1f", "MIG-2f"]),
        (" 3 ,1", ["3", "1"]),
        ("0,-1,1", ["0"]),  # CUDA reads no further
        ("", [""]),
    ],
)
def test_jobs_on_this_machine_share_the_gpus_that_the_user_names(tmp_path, monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(LocalCluster, "states", lambda _, ids: {each: JobState("RUNNING") for each in ids})
    cluster = LocalCluster(Profile(kind="local"), tmp_path, "", concurrent=2, pack=1)
    for place in range(2 * len(gpus)):
        assert cluster._free_gpu() == gpus[place % len(gpus)]
        cluster._gpu_of[str(place)] = gpus[place % len(gpus)]


def test_a_machine_without_gpu_files_is_not_asked_for_gpus(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local, "GPU_DEVICES", ("no-such-device",))
    monkeypatch.setattr(local, "_counted_by_cuda", lambda: pytest.fail("CUDA was asked"))
    assert LocalCluster(Profile(kind="local"), tmp_path, "", concurrent=2, pack=1)._free_gpu() == ""
    monkeypatch.setattr(local, "GPU_DEVICES", ("null",))  # which every machine has
    monkeypatch.setattr(local, "_counted_by_cuda", lambda: 1)  # in a container, whatever number the file has
    assert LocalCluster(Profile(kind="local"), tmp_path, "", concurrent=2, pack=1)._free_gpu() == "0"
    monkeypatch.setattr(local, "_counted_by_cuda", lambda: 0)  # as torch for AMD's would, or one without CUDA
    assert LocalCluster(Profile(kind="local"), tmp_path, "", concurrent=2, pack=1)._free_gpu() == ""
    monkeypatch.setattr(local, "NVIDIA", "null")  # its driver is too old for torch: the job says so
    assert LocalCluster(Profile(kind="local"), tmp_path, "", concurrent=2, pack=1)._free_gpu() == "0"


@pytest.mark.parametrize(
    ("changes", "asks"),
    [
        ({"gres": "gpu:rtx8000:1"}, True),
        ({"gres": "gpu"}, True),
        ({"gres": "nvme:1"}, False),
        ({"sbatch": {"gpus-per-node": 2}}, True),
        ({"sbatch": {"gres": "nvme:1,gpu:2"}}, True),
        ({"sbatch": {"exclusive": True}}, False),
        ({}, False),
    ],
)
def test_whether_a_profile_asks_for_gpus(changes, asks):
    assert Profile(kind="slurm", **changes).asks_for_gpus is asks


def test_jobs_of_a_sweep_train_in_what_the_first_of_them_chose(digits, tmp_path, monkeypatch):
    trials = [TrialFolder.request(tmp_path / "trials", digits(precision="auto", init_seed=seed)) for seed in (1, 2)]
    monkeypatch.setattr(precision, "choose", lambda _, __, kept=None: kept or "bf16")
    assert job.load(trials[0]).precision == "bf16"
    monkeypatch.setattr(precision, "choose", lambda _, __, kept=None: kept or "fp32")
    assert job.load(trials[1]).precision == "bf16"
    lines = iter((None, "bf16"))  # both begin at once
    monkeypatch.setattr(job, "read_line", lambda _: next(lines))
    assert job.load(trials[1]).precision == "bf16"


@pytest.mark.parametrize("behind", [-300, 300])
def test_a_node_whose_clock_is_minutes_apart_runs_the_trial_all_the_same(digits, tmp_path, monkeypatch, behind):
    trial = TrialFolder.request(tmp_path / "trials", digits())
    trial.record_job("1", tmp_path / "log")
    queued, running = status._times(trial)
    assert (queued[:5], running) == ("0:00:", "")
    here = time.time
    with monkeypatch.context() as on_the_node:
        on_the_node.setattr(time, "time", lambda: here() - behind)
        trial.claim()
    queued, running = status._times(trial)
    assert (queued[:5], running[:5]) == ("0:00:", "0:00:")


@pytest.mark.parametrize(("signum", "requeued"), [(signal.SIGTERM, []), (signal.SIGUSR2, [signal.SIGUSR2])])
def test_a_job_leaves_at_either_signal_and_requeues_at_one(digits, tmp_path, monkeypatch, signum, requeued):
    """SIGTERM comes from those who end a job, or start it again themselves."""
    trial = TrialFolder.request(tmp_path / "trials", digits())
    seen: list[object] = []
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR2)}

    def train(first: TrialFolder, trials: int, leaving: Callable[[], bool]) -> None:
        assert not leaving()
        os.kill(os.getpid(), signum)
        assert leaving()

    monkeypatch.setattr(job, "train_one_by_one", train)
    try:
        signal.signal(signal.SIGUSR2, lambda each, _: seen.append(each))  # as submitit's
        job.run(trial.path, threads=1)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert seen == requeued
