"""One look that feeds all who follow a sweep: what it finds, what it costs, and when the next one is due."""

from __future__ import annotations

import builtins
import json
import os
from collections import Counter

import pytest
from support.stale import Stale

from cluster import scan as scanning
from cluster.scan import MAX_POLL, MIN_POLL, STALE_SECONDS, FollowedTrial, Scan
from cluster.trial_folder import NEWS, State, StopReason, TrialFolder


class Clock:
    """Stands for the clock of the scan."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(scanning, "time", clock)
    return clock


@pytest.fixture
def scan(tmp_path, clock) -> Scan:
    return Scan(tmp_path)


@pytest.fixture
def trial(scan, digits, tmp_path) -> FollowedTrial:
    """A trial of three epochs whose job runs, once that was seen."""
    trial = scan.request(digits())
    trial.record_job("1", tmp_path / "log")
    scan.poll()
    return trial


@pytest.fixture
def told(scan) -> list[str]:
    """The trials that a listener was told of."""
    told: list[str] = []
    scan.subscribe(lambda trial: told.append(trial.name))
    return told


def result(epoch: int, seconds: float = 1.0) -> dict:
    return {"epoch": epoch, "val_top1": 10.0 * epoch, "seconds": seconds}


def operations(monkeypatch: pytest.MonkeyPatch, work) -> Counter[str]:
    """What `work` asks of the file system."""
    asked: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        for module, name in ((os, "stat"), (os, "listdir"), (os, "scandir"), (os, "open"), (builtins, "open")):
            original = getattr(module, name)

            def counted(*args, _original=original, _name=name, **kwargs):
                asked[_name] += 1
                return _original(*args, **kwargs)

            patch.setattr(module, name, counted)
        work()
    return asked


def test_a_look_that_finds_nothing_costs_one_stat_of_each_trial(scan, trial, clock, digits, tmp_path, monkeypatch):
    other = scan.request(digits(init_seed=1))
    other.record_job("2", tmp_path / "log")
    trial.claim().append(result(1))
    other.claim()
    clock.now += 1
    scan.poll()
    clock.now += MAX_POLL
    assert operations(monkeypatch, scan.poll) == {"stat": 2}
    assert operations(monkeypatch, scan.poll) == {}  # none is due


def test_what_a_job_records_is_news_once(scan, trial, clock, told):
    attempt = trial.claim()
    attempt.append(result(1))
    clock.now += 1
    scan.poll()
    assert (told, trial.results(), trial.ended()) == ([trial.name], [result(1)], None)
    clock.now += 1
    scan.poll()
    assert told == [trial.name]
    attempt.append(result(2))
    attempt.append(result(3))
    attempt.end(State.FINISHED)
    clock.now += 1
    scan.poll()
    assert told == [trial.name] * 2
    assert trial.results() == [result(1), result(2), result(3)]
    assert trial.ended().state == State.FINISHED
    assert scan.open() == []


def test_two_changes_within_a_tick_of_the_clock_are_both_seen(scan, trial, clock, told):
    """A size tells them apart where times can't."""
    attempt = trial.claim()
    for epoch in (1, 2):
        attempt.append(result(epoch))
        os.utime(trial.path / NEWS, (5, 5))
        clock.now += 1
        scan.poll()
    assert told == [trial.name] * 2
    assert len(trial.results()) == 2


def test_a_new_attempt_takes_the_place_of_the_old(scan, trial, clock):
    first = trial.claim()
    first.append(result(1))
    clock.now += 1
    scan.poll()
    second = trial.claim()
    first.append(result(99))  # by a job that is taken for dead
    second.append(result(2))
    clock.now += 1
    scan.poll()
    assert trial.results() == [result(1), result(2)]


def test_a_torn_line_is_read_once_it_is_whole(scan, trial, clock):
    attempt = trial.claim()
    attempt.append(result(1))
    with open(attempt.path / "results.jsonl", "a") as file:
        file.write('{"epoch": 2')
    clock.now += 1
    scan.poll()
    assert trial.results() == [result(1)]
    attempt.append(result(2))
    clock.now += 1
    scan.poll()
    assert trial.results() == [result(1), result(2)]


@pytest.mark.parametrize(
    ("seconds", "elapsed", "pause"),
    [
        (2, 0, MIN_POLL),
        (60, 0, 6),
        (60, 50, 6),
        (60, 57, 3),  # the next epoch is due then
        (60, 60, MIN_POLL),
        (60, 65.9, MIN_POLL),
        (60, 66.1, 6),  # it takes longer than the last one
        (3600, 0, MAX_POLL),
        (3600, 3600, MIN_POLL),
    ],
)
def test_when_the_next_look_is_due(trial, scan, clock, seconds, elapsed, pause):
    trial.claim().append(result(1, seconds))
    clock.now += 1
    scan.poll()
    clock.now += elapsed
    assert trial.wait() == pytest.approx(pause)


def test_a_start_and_an_end_are_seen_soon(trial, scan, clock):
    assert trial.wait() == MIN_POLL
    clock.now += 100
    assert trial.wait() == 10  # its job waits, or loads the data
    attempt = trial.claim()
    for epoch in (1, 2, 3):
        attempt.append(result(epoch, 60))
    scan.poll()
    assert trial.wait() == MIN_POLL  # it has no epoch left
    clock.now += 1000
    assert trial.wait() == MAX_POLL


def test_a_trial_that_is_given_up_is_looked_at_soon(trial, scan, clock):
    trial.claim().append(result(1, 600))
    clock.now += 1
    scan.poll()
    assert scan.seconds_until_due() == MAX_POLL
    trial.stop(StopReason.SEARCH)
    assert scan.changed.is_set()
    assert scan.seconds_until_due() == 0
    scan.poll()
    assert scan.seconds_until_due() == MIN_POLL


def test_a_trial_without_a_job_is_not_looked_at(scan, clock, digits, monkeypatch):
    scan.request(digits())
    scan.poll()
    clock.now += MAX_POLL
    assert operations(monkeypatch, scan.poll) == {}


def test_a_bell_that_could_not_be_rung_costs_no_news(scan, trial, clock, told, monkeypatch):
    """On a full disk: a time is set, which takes no room; and who finds the job gone has the folder read."""
    attempt = trial.claim()
    clock.now += 1
    scan.poll()
    told.clear()
    whole_open = builtins.open

    def full(path, mode="r", *args, **kwargs):
        if str(path).endswith(NEWS):
            raise OSError(28, "No space left on device")
        return whole_open(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full)
        attempt.append(result(1))
    clock.now += 1
    scan.poll()
    assert told == [trial.name]
    (trial.path / NEWS).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full)
        attempt.append(result(2))
    trial.wake()
    scan.poll()
    assert len(trial.results()) == 2


def test_a_folder_that_can_not_be_read_is_tried_again(scan, trial, clock, told, monkeypatch, digits, tmp_path):
    other = scan.request(digits(init_seed=1))
    other.record_job("2", tmp_path / "log")
    scan.poll()
    told.clear()
    for each in (trial, other):
        each.claim().append(result(1))
    read = FollowedTrial._read_new

    def stale(self):
        if self is trial:
            raise OSError(116, "Stale file handle")
        return read(self)

    clock.now += 1
    with monkeypatch.context() as patch:
        patch.setattr(FollowedTrial, "_read_new", stale)
        with pytest.raises(OSError, match="Stale file handle"):
            scan.poll()
    assert told == [other.name]
    clock.now += 1
    scan.poll()
    assert told == [other.name, trial.name]


def test_a_survey_has_each_trial_once(scan, trial, clock, digits):
    """A job whose trial has just ended is free, and never neither busy nor free."""
    waits = scan.request(digits(init_seed=1))
    assert scan.survey() == ([trial, waits], [])
    trial.claim().end(State.FINISHED)
    assert scan.survey() == ([trial, waits], [])  # nobody has looked
    clock.now += 1
    seen = []
    scan.subscribe(lambda _: seen.append(scan.survey()))  # while listeners are told
    scan.poll()
    assert seen == [([waits], [trial])]
    assert scan.survey() == ([waits], [])


@pytest.mark.parametrize("line", ["\0\0\0\n", "{\n"])
def test_a_line_that_nobody_wrote_costs_the_others_no_news(scan, trial, clock, told, digits, tmp_path, line):
    """As a power cut may leave it."""
    others = [scan.request(digits(init_seed=seed)) for seed in (1, 2)]
    for each in others:
        each.record_job(each.name, tmp_path / "log")
    scan.poll()
    told.clear()
    others[0].claim().end(State.FAILED)
    broken = trial.claim()
    broken.append(result(1))
    (broken.path / "results.jsonl").write_text(line)
    others[1].claim().append(result(1))
    for _ in range(2):  # it is tried again
        clock.now += MAX_POLL
        with pytest.raises(json.JSONDecodeError):
            scan.poll()
    assert told == [each.name for each in others]
    others[1].newest().append(result(2))
    clock.now += MAX_POLL
    with pytest.raises(json.JSONDecodeError):
        scan.poll()
    assert len(others[1].results()) == 2


def test_a_listener_that_fails_costs_the_others_no_news(scan, trial, clock):
    heard = []

    def gone(_: FollowedTrial) -> None:
        raise OSError(5, "Input/output error")

    scan.subscribe(gone)
    scan.subscribe(lambda trial: heard.append(trial.name))
    trial.claim().append(result(1))
    clock.now += 1
    with pytest.raises(OSError, match="Input/output error"):
        scan.poll()
    assert heard == [trial.name]


def test_what_was_there_before_is_news_at_the_first_look(tmp_path, digits, clock):
    done, begun, waits = (TrialFolder.request(tmp_path, digits(init_seed=seed)) for seed in range(3))
    for trial in (done, begun):
        trial.claim().append(result(1))
    done.newest().end(State.STOPPED)
    scan = Scan(tmp_path)
    found = {}
    scan.subscribe(lambda trial: found.update({trial.name: (len(trial.results()), trial.ended())}))
    scan.poll()
    assert {name: results for name, (results, _) in found.items()} == {done.name: 1, begun.name: 1, waits.name: 0}
    assert [trial.name for trial in scan.open()] == [begun.name, waits.name]
    again = scan.request(digits(init_seed=0))  # a search asks for it once more
    assert (again.results(), again.ended().state) == ([result(1)], State.STOPPED)
    assert len(scan.open()) == 2


SECOND = "attempts/0002"


@pytest.mark.parametrize("late", [NEWS, SECOND, f"{SECOND}/results.jsonl", f"{SECOND}/end.json"])
def test_what_a_network_disk_shows_late_is_seen_once(scan, trial, clock, told, monkeypatch, late):
    """The rest of it may be seen before; a trial is not through before all of its epochs are there."""
    trial.claim().append(result(1))
    clock.now += 1
    scan.poll()
    told.clear()
    stale = Stale(monkeypatch)
    if late == NEWS:
        stale.keep(trial.path / NEWS)
    attempt = trial.claim()
    for epoch in (2, 3):
        attempt.append(result(epoch))
    attempt.end(State.FINISHED)
    if late != NEWS:
        stale.hide(trial.path / late)
    for _ in range(4):
        clock.now += STALE_SECONDS / 5
        scan.poll()
        assert scan.open() == [trial]
    assert trial.ended() is None
    if late in (NEWS, SECOND):
        assert (told, trial.results()) == ([], [result(1)])
    stale.show()
    clock.now += MAX_POLL
    scan.poll()
    assert trial.results() == [result(1), result(2), result(3)]
    assert trial.ended().state == State.FINISHED
    assert scan.open() == []


def test_a_network_disk_is_asked_again_where_something_is_missing(scan, trial, clock, told, monkeypatch):
    """As NFS shows a name that it has not found before once its folder is listed."""
    attempt = trial.claim()
    for epoch in (1, 2, 3):
        attempt.append(result(epoch))
    attempt.end(State.FINISHED)
    stale = Stale(monkeypatch, until_listed=True)
    stale.hide(attempt.path / "end.json")
    clock.now += 1
    scan.poll()
    assert trial.ended().state == State.FINISHED


def test_a_driver_elsewhere_finds_the_job_that_was_noted(trial, tmp_path, monkeypatch):
    stale = Stale(monkeypatch, until_listed=True)
    stale.hide(trial.path / "job.json")
    assert [each.job_id for each in Scan(tmp_path).open()] == ["1"]


def test_what_a_stale_job_says_delays_the_end_by_so_long(scan, trial, clock):
    """It rings for an epoch that no longer counts, which looks like one that is not seen yet."""
    first = trial.claim()
    second = trial.claim()
    first.append(result(99))
    second.append(result(1))
    second.end(State.STOPPED)
    clock.now += 1
    scan.poll()
    assert (trial.results(), trial.ended()) == ([result(1)], None)
    clock.now += STALE_SECONDS + MAX_POLL
    scan.poll()
    assert trial.ended().state == State.STOPPED
