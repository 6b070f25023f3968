"""That a sweep has one driver, on disks with locks and without, and what a dead one has left; disks without links."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import PIPE

import pytest
from support.samples import synthetic
from support.waiting import wait_for

from cluster.job_manager import JobManager
from cluster.local import LocalCluster
from cluster.profile import Profile
from cluster.trial_folder import StopReason, TrialFolder
from lorvp.errors import UserError
from lorvp.utils import files
from sweeps import launch, lock
from sweeps.folder import RECORD, Command
from sweeps.lock import ALIVE, DEAD_SECONDS, Held, Holder
from sweeps.run import status
from sweeps.spec import file as spec_file

NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture(params=[None, *NO_LOCKS], ids=lambda number: errno.errorcode[number] if number else "flock")
def disk(request, monkeypatch) -> int | None:
    """One with locks, or one that says that it has none."""
    if request.param:
        no_locks(monkeypatch, request.param)
    return request.param


def no_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOLCK) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


def left(sweep: Path, driver: Holder) -> None:
    """What a driver that was killed leaves where there are no locks."""
    files.create(sweep / ALIVE, json.dumps(asdict(driver)))


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_sweep_has_one_driver(disk, tmp_path):
    me = f"process {os.getpid()} on {socket.gethostname()}"
    assert lock.holder(tmp_path) is None
    with lock.held(tmp_path):
        assert str(lock.holder(tmp_path)) == me
        with pytest.raises(Held, match=me), lock.held(tmp_path):
            raise AssertionError
        assert str(lock.holder(tmp_path)) == me
    assert lock.holder(tmp_path) is None
    with lock.held(tmp_path):
        pass


def test_an_error_of_the_driver_frees_the_sweep(disk, tmp_path):
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path):
        raise ZeroDivisionError
    assert lock.holder(tmp_path) is None


def of_another_machine() -> Holder:
    return replace(Holder.this_process(), host="node7")


@pytest.mark.parametrize(
    ("driver", "silent"),
    [
        (lambda: replace(Holder.this_process(), process=ended_process()), 0.0),
        (lambda: replace(Holder.this_process(), started=1.0), 0.0),  # its number is another process's by now
        (of_another_machine, DEAD_SECONDS + 1),
    ],
    ids=["ended", "number taken", "silent elsewhere"],
)
def test_what_a_dead_driver_has_left_is_taken_over(driver, silent, tmp_path, monkeypatch):
    no_locks(monkeypatch)
    left(tmp_path, driver())
    os.utime(tmp_path / ALIVE, times=(time.time() - silent,) * 2)
    assert lock.holder(tmp_path) is None
    with lock.held(tmp_path):
        assert lock.holder(tmp_path).process == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]


def test_of_two_that_take_over_one_does(tmp_path, monkeypatch):
    no_locks(monkeypatch)
    dead = replace(Holder.this_process(), process=ended_process())
    left(tmp_path, dead)
    files.create(tmp_path / f".{ALIVE}.{dead.name}", "another driver's")
    with pytest.raises(Held), lock.held(tmp_path):
        raise AssertionError


def test_a_driver_elsewhere_that_beats_is_left_alone(tmp_path, monkeypatch):
    """By the disk's clock, whatever this machine's says."""
    no_locks(monkeypatch)
    left(tmp_path, of_another_machine())
    monkeypatch.setattr(time, "time", lambda: 1e12)
    with pytest.raises(Held, match="on node7"), lock.held(tmp_path):
        raise AssertionError


def test_a_driver_beats(tmp_path, monkeypatch):
    no_locks(monkeypatch)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with lock.held(tmp_path):
        os.utime(tmp_path / ALIVE, times=(0, 0))
        wait_for("beat", lambda: (tmp_path / ALIVE).stat().st_mtime > 0)


def spec_of(folder: Path):
    """A sweep that was begun in a folder."""
    quickstart = Path(launch.__file__).parent / "quickstart.yaml"
    spec = spec_file.load(quickstart, [f"output={folder}"])
    spec.folder.mkdir(parents=True)
    values = spec.model_dump(mode="json", by_alias=True)
    (spec.folder / RECORD).write_text(json.dumps({"id": "1", "spec": values}))
    return spec


@contextmanager
def bystander():
    """A process of somebody else's, which shall live."""
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=PIPE, stdout=PIPE) as process:
        try:
            process.stdout.readline()  # it has its handlers
            yield process.pid
            assert process.poll() is None  # a signal would have ended it
        finally:
            process.kill()


def manager_of(spec) -> JobManager:
    return JobManager(spec.trials, LocalCluster(Profile(kind="local"), spec.folder, "", 1, 1))


def test_cancel_signals_no_process_that_is_no_driver(tmp_path, monkeypatch):
    """Not one that has got the number of a driver that was killed, nor what has it on this machine of another's."""
    no_locks(monkeypatch)
    spec = spec_of(tmp_path)
    (spec.folder / lock.LOCK).touch()
    with bystander() as pid:
        left(spec.folder, replace(Holder.this_process(), process=pid, started=1.0))
        assert status.cancel(spec, manager_of(spec)) == 0
        (spec.folder / ALIVE).unlink()
        left(spec.folder, replace(of_another_machine(), process=pid))
        with pytest.raises(UserError, match=f"its driver is process {pid} on node7; end it there first"):
            status.cancel(spec, manager_of(spec))


# disks without hard links


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def no_links(request, monkeypatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("no_links")
def test_a_trials_folder_needs_no_links(digits, tmp_path):
    trial = TrialFolder.request(tmp_path / "trials", digits())
    first = trial.claim()
    first.checkpoint.write_bytes(b"state")
    assert trial.claim().checkpoint.read_bytes() == b"state"
    trial.stop(StopReason.SEARCH)
    trial.stop(StopReason.INTERRUPT)
    assert trial.stop_reason() == StopReason.SEARCH
    assert trial.assign_next(trial)
    assert not trial.assign_next(None)
    assert trial.assigned_next() == trial.name


def test_what_is_not_whole_yet_has_not_been_said(digits, tmp_path):
    """Where a name is taken before the file is whole: an empty word is no word."""
    trial = TrialFolder.request(tmp_path / "trials", digits())
    (trial.path / "next").touch()
    (trial.path / "stop").touch()
    assert trial.assigned_next() is None
    assert trial.stop_reason() is None


# a sweep's folder that lies elsewhere by now


def test_a_sweep_that_was_moved_and_renamed(tmp_path):
    """It is shown, resumed and reached by another path; nothing inside it says where it was."""
    spec = spec_file.load(Path(launch.__file__).parent / "quickstart.yaml", [f"output={tmp_path / 'old'}"])
    synthetic.make(spec, 2)
    trial = TrialFolder.requested(spec.trials)[0]
    log = spec.folder / "jobs" / "7_0_log.out"
    log.parent.mkdir()
    log.write_text("its last words\n")
    trial.record_job("7", log)
    (tmp_path / "new").mkdir()
    spec.folder.rename(tmp_path / "new" / "renamed")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for output in (tmp_path / "new", tmp_path / "link"):
        moved = spec_file.load(Path(launch.__file__).parent / "quickstart.yaml", [f"output={output}", "name=renamed"])
        trial = TrialFolder.requested(moved.trials)[0]
        assert trial.last_log_lines() == ["its last words"]
        with launch.sweep_folder(moved, True, Command("quickstart.yaml", [])) as sweep_id:
            assert sweep_id == "synthetic"
    text = "".join(path.read_text() for path in (tmp_path / "new").rglob("job.json"))
    assert str(tmp_path) not in text
