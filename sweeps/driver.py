"""The driver of a sweep, from its first trial to the best prompt in MLflow. Ray lives here alone, while it searches."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.folder import TrialFolder
from cluster.relay import Relay
from cluster.slurm import requeue_this_job
from lorvp.bundle_format import EXAMPLE
from lorvp.errors import UserError
from sweeps import confirm, report
from sweeps.comparison import Comparison
from sweeps.follow import Follower
from sweeps.leaderboard import Leaderboard
from sweeps.outcome import Outcome
from sweeps.spec import Spec
from sweeps.tracking import Tracker

EXIT_NO_RESULT, EXIT_INTERRUPTED = 1, 130


def carry_out(spec: Spec, sweep_id: str, spec_text: str, relay: Relay, leave_running: bool, console: Console) -> int:
    """Runs the sweep to its end and returns the exit code."""
    ending = Ending()
    tracker = Tracker(spec, sweep_id, spec_text)
    console.print(f"sweep {spec.name} in {spec.folder}, MLflow at {tracker.uri}", highlight=False)
    follower = Follower(spec, relay, tracker, console)
    search = partial(run_search, spec, ending, console)
    follower.start()
    try:
        for config in spec.control_configs():
            TrialFolder.request(spec.trials, config)
        choices = None
        if spec.confirm is None:
            search()
        else:
            choices = confirm.search_and_confirm(spec, search, follower)
        all_sent = follower.finish()
    except BaseException as error:
        follower.halt()
        if leave_running or ending.time_limit_nears:
            console.print("ending: the jobs go on")
        else:
            console.print("ending: the jobs write their checkpoints and stop")
            relay.interrupt()
            follower.catch_up(patience=5)
        status_of_run = "FAILED" if follower.given_up else "KILLED"
        tracker.try_to(lambda: tracker.close(status_of_run, [], []), patience=5)
        if follower.given_up:
            return give_up(spec, follower.given_up, console)
        if ending.time_limit_nears:
            console.print("the time limit nears: this driver is requeued", highlight=False)
            requeue_this_job()
        else:
            console.print(f"interrupted; --resume goes on where {spec.folder} stands", highlight=False)
        if not isinstance(error, KeyboardInterrupt):
            raise
        return EXIT_INTERRUPTED
    board = Leaderboard.read(spec)
    outcome = Outcome(sweep_id, spec, board, Comparison.of(board, choices) if choices is not None else None)
    return conclude(outcome, tracker, all_sent, console)


def conclude(outcome: Outcome, tracker: Tracker, all_sent: bool, console: Console) -> int:
    """Shows, writes and sends to MLflow what the sweep found; the exit code."""

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, highlight=False, markup=False)

    spec, board, comparison, best = outcome.spec, outcome.board, outcome.comparison, outcome.best()
    files = [spec.folder / "results.parquet"]
    board.write_parquet(files[0])
    console.print(board.table())
    if comparison:
        files += comparison.write()
        console.print(comparison.table())
    verdict = [*board.failures(), *board.trust(), *outcome.verdict()]
    for line in verdict:
        say(line)
    say(f"every epoch: {files[0]}")
    if best is None:
        tracker.try_to(lambda: tracker.close("FAILED", files, verdict))
        return EXIT_NO_RESULT
    try:
        page = report.write(outcome)
        files += [page, page.with_name(report.PICTURES)]
        say(f"report:      {page}")
    except Exception as error:  # a figure that can't be drawn shall not cost the sweep its model
        say(f"no report: {type(error).__name__}: {error}", style="red")
    bundle = best.bundle
    say(f"best prompt: {bundle}")
    models: list[str] = []
    try:
        all_sent &= tracker.try_to(lambda: models.append(tracker.register(bundle, best.trial.name, outcome.verdict())))
    except UserError as error:  # no weights here, where they are on the nodes: the bundle is there all the same
        say(f"no registered model: {error}", style="yellow")
    all_sent &= tracker.try_to(lambda: tracker.close("FINISHED", files, verdict))
    if not all_sent:
        say("MLflow did not take everything; --resume sends what is missing", style="red")
        return EXIT_NO_RESULT
    for model in models:
        say(f"as a model:  {model}")
    say(f"look at it:  {tracker.ui_command()}")
    say(f"try it:      python -m lorvp.predict {bundle} {bundle / EXAMPLE}")
    return 0


def give_up(spec: Spec, reason: str, console: Console) -> int:
    """Says why the sweep was ended early, and what failed."""
    console.print(f"given up: {reason}", style="red", highlight=False)
    for line in Leaderboard.read(spec).failures():
        console.print(line, highlight=False, markup=False)
    return EXIT_NO_RESULT


class Ending:
    """Makes a signal raise KeyboardInterrupt, once: the jobs are then ended before the driver is.

    Which signal it was is kept here, as Ray may raise another KeyboardInterrupt in its place.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._held_back = False
        self._listen()

    @property
    def time_limit_nears(self) -> bool:
        """Whether this driver is a job that will be ended soon; the sweep's own jobs need not be."""
        return self.signal == signal.SIGUSR2 and "SLURM_JOB_ID" in os.environ

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """While Ray starts, which bears no interruption and puts handlers of its own in: signals count afterwards."""
        set_handler = signal.signal

        def pass_on(signum: int, handler: Any) -> Any:
            return None if signum in self.SIGNALS else set_handler(signum, handler)

        signal.signal = pass_on  # type: ignore[assignment]  # as Ray calls it
        self._held_back = True
        try:
            yield
        finally:
            self._held_back = False
            signal.signal = set_handler
            self._listen()  # again: Ray's C++ part has its own way to take SIGTERM
        if self.signal:
            self._interrupt(self.signal, None)

    def _listen(self) -> None:
        for each in self.SIGNALS:
            signal.signal(each, self._interrupt)

    def _interrupt(self, signum: int, frame: object) -> None:
        self.signal = signal.Signals(signum)
        if self._held_back:
            return
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt


def run_search(spec: Spec, ending: Ending, console: Console) -> None:
    """Lets Tune suggest, follow and stop trials until the search is through. Ray lives in this process's children."""
    os.environ |= {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray writes one into the home folder
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: Ray listens on loopback only
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),  # nothing is restored from Tune's own state
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are the driver's own business
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # results are recorded in the folders and in MLflow
    }
    import optuna
    import ray
    from ray import tune

    from sweeps.search import RecordingSearch, Suggestions, make_scheduler
    from sweeps.tune_trial import NOT_VALID, StopGivenUp, TuneTrial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are told below, and by the follower
    of_ray = spec.folder / "ray"
    shutil.rmtree(of_ray, ignore_errors=True)  # of a driver that was killed, whose Ray may still write as it ends
    of_ray.mkdir(exist_ok=True)
    files = Path(tempfile.mkdtemp(dir=of_ray))
    (files / "session").mkdir()
    with tempfile.TemporaryDirectory(prefix="lorvp-") as short:
        # Ray's sockets lie in its folder, and the path of a socket may be 107 bytes long: a short way there
        link = Path(short) / "ray"
        link.symlink_to(files / "session")
        try:
            with ending.held_back():
                ray.init(
                    address="local",
                    num_cpus=spec.search.concurrent,
                    num_gpus=0,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=100 << 20,
                    _temp_dir=str(link),
                )
            tuner = tune.Tuner(
                tune.with_resources(tune.with_parameters(TuneTrial, spec=spec), {"cpu": 1}),
                tune_config=tune.TuneConfig(
                    search_alg=RecordingSearch(spec, Suggestions(spec.folder)),
                    scheduler=make_scheduler(spec),
                    num_samples=spec.number_of_trials(),
                    max_concurrent_trials=spec.search.concurrent,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(files),
                    callbacks=[StopGivenUp(spec)],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the folder is the checkpoint
                    verbose=0,
                ),
            )
            for error in tuner.fit().errors:
                reason = str(error).strip().splitlines()[-1]
                if "TrialFailed" not in reason:  # those that failed in training are recorded as such
                    raise error
                if NOT_VALID in reason:  # those have no folder to be recorded in
                    console.print(reason[reason.index(NOT_VALID) :], style="yellow", markup=False)
        finally:
            ray.shutdown()
    shutil.rmtree(of_ray, ignore_errors=True)
