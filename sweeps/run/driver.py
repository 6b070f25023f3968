"""The driver of a sweep, from its first trial to the best prompt in MLflow."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import optuna
from rich.console import Console

from cluster.job_manager import JobManager
from cluster.slurm import requeue_this_job
from lorvp.bundle.format import EXAMPLE
from lorvp.errors import UserError
from lorvp.utils.explain import without_passwords
from sweeps.report.stopping import stopping_lines
from sweeps.results import confirm
from sweeps.results.comparison import Comparison
from sweeps.results.confirm import Choice
from sweeps.results.leaderboard import Leaderboard
from sweeps.results.next_steps import next_steps
from sweeps.results.outcome import Outcome
from sweeps.run.jobs import Jobs
from sweeps.run.live_view import Follower, GivenUp
from sweeps.run.signals import EXIT_INTERRUPTED, SignalHandler
from sweeps.search.controller import Failure, SweepController
from sweeps.search.controls import WithControls
from sweeps.search.stopping import make_scheduler
from sweeps.search.suggest import ArmSeconds, RecordingSearch, Suggestions
from sweeps.search.tune_trial import Trials
from sweeps.spec.model import Spec
from sweeps.tracking.sender import Sender
from sweeps.tracking.store import is_sure_to_open, tracking_uri, ui_command

if TYPE_CHECKING:
    from sweeps.tracking.tracker import Tracker

EXIT_NO_RESULT = 1
TRACEBACK = "driver-error.txt"
"""In the sweep's folder: of an error that the driver has no words for."""


class SearchFailed(Exception):
    """The search ended before its time; all trials that it asked for have ended since."""


def run(
    spec: Spec,
    sweep_id: str,
    spec_text: str,
    manager: JobManager,
    signals: SignalHandler,
    leave_running: bool,
    console: Console,
) -> int:
    """Run the sweep to its end and returns the exit code. Raises KeyboardInterrupt before a job was asked for."""

    def connect() -> Tracker:
        with hide_module("polars"):  # which MLflow imports where it is installed: 23 MiB that no sweep uses
            from sweeps.tracking.tracker import Tracker  # MLflow, which takes seconds

        return Tracker(spec, sweep_id, spec_text)

    uri = tracking_uri(spec)
    opened = None if is_sure_to_open(uri, spec.tracking.experiment) else connect()
    console.print(f"sweep {spec.name} in {spec.folder}, MLflow at {without_passwords(uri)}", highlight=False)
    follower, spent = Follower(spec, manager, console), ArmSeconds(spec)
    sender = Sender((lambda: opened) if opened else connect, spec.trials, spec.control_names(), follower.warn)
    jobs = Jobs(manager, follower, sender)
    jobs.subscribe(spent.note)
    try:
        jobs.start()
        choices = train(spec, spent, jobs, follower, console)
        jobs.stop()
        all_sent = jobs.finish()
        board = Leaderboard.read(spec)
        comparison = Comparison.of(board, choices) if choices is not None else None
        return conclude(Outcome(sweep_id, spec, board, comparison), sender.tracker, all_sent, console)
    except KeyboardInterrupt:
        jobs.stop()
        if leave_running or signals.time_limit_nears:
            console.print("ending: the jobs go on")
        else:
            console.print("ending: the jobs write their checkpoints and stop")
            jobs.interrupt()
        jobs.finish(patience=5)
        close(sender.tracker, "KILLED")
        if signals.time_limit_nears:
            console.print("the time limit nears: this driver is requeued", highlight=False)
            try:
                requeue_this_job()
            except OSError as error:
                console.print(f"it can't be: {error}; --resume goes on where {spec.folder} stands", highlight=False)
        else:
            console.print(f"interrupted; --resume goes on where {spec.folder} stands", highlight=False)
        return EXIT_INTERRUPTED
    except GivenUp as reason:
        signals.exit_on_next()
        jobs.stop()
        console.print("ending: the jobs write their checkpoints and stop")
        jobs.interrupt()
        end_without_result(jobs, sender, f"given up: {reason}", spec, console)
    except SearchFailed as reason:
        signals.exit_on_next()
        jobs.stop()
        with suppress(Exception):  # of the disk that the search failed by
            console.print(Leaderboard.read(spec).table())
        end_without_result(jobs, sender, str(reason), spec, console)
    except Exception as error:  # a fault of ours, or of a library's: jobs that train are not to pay for it
        signals.exit_on_next()
        with suppress(OSError):
            (spec.folder / TRACEBACK).write_text(without_passwords(traceback.format_exc()))
        jobs.stop()
        text = f"{one_line(error)}; the jobs go on, and so does --resume; {spec.folder / TRACEBACK} says where it was"
        end_without_result(jobs, sender, text, spec, console)
    return EXIT_NO_RESULT


def train(spec: Spec, spent: ArmSeconds, jobs: Jobs, follower: Follower, console: Console) -> list[Choice] | None:
    """Have trained what the search suggests, the control, and what confirms the best; what was chosen to be confirmed.

    Raises SearchFailed once all has ended that was asked for before the search failed.
    """
    choices = confirm.chosen(spec)
    trials = WithControls(jobs, spec.control_configs(), jobs.request, jobs.at_once)
    if choices is None:
        failed = run_search(spec, spent, trials, console)
    trials.request_controls()  # where there was nothing to search, or it never waited
    if choices is None:
        jobs.wait_for_all()  # what it gave up is still ending
        if failed:
            raise SearchFailed(failed)
        if spec.confirm is None:
            return None
        choices = confirm.choose(spec)
    names = confirm.request(spec, choices, jobs.request)
    follower.confirm(names)
    text = f"confirmation: {len(choices)} configs with the control, {len(names)} trials"
    console.print(text, highlight=False)
    jobs.wait_for_all()
    return choices


def run_search(spec: Spec, spent: ArmSeconds, trials: Trials[Any], console: Console) -> str:
    """Let Tune suggest, follow and stop trials until the search is through; why it was not, if it failed before."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", message="Define-by-run function")  # Ray's, of samplers that take a second

    def tell(line: str) -> None:
        console.print(line, style="yellow", markup=False)

    failure = Failure(lambda error: tell(f"the search failed: {one_line(error)}; the jobs that run go on"))
    suggestions = Suggestions(spec.folder)
    try:
        search = RecordingSearch(spec, suggestions, spent)
        SweepController(spec, search, make_scheduler(spec), trials, failure, tell).run()
    except GivenUp:
        raise
    except Exception as error:  # of Tune's own
        failure.note(error)
    tried = len(suggestions.read())
    if failure.error is None or tried >= spec.number_of_trials():
        return ""
    return (
        f"the search failed after {tried} of {spec.number_of_trials()} trials: {one_line(failure.error)}; "
        "mend that, and --resume goes on with it"
    )


def conclude(outcome: Outcome, tracker: Tracker | None, all_sent: bool, console: Console) -> int:
    """Show, writes and sends to MLflow what the sweep found; the exit code."""

    def print_line(line: str, style: str | None = None) -> None:
        console.print(line, style=style, highlight=False, markup=False)

    def send(what: Callable[[Tracker], None]) -> bool:
        return tracker is not None and tracker.retry(lambda: what(tracker))

    spec, board, comparison, best = outcome.spec, outcome.board, outcome.comparison, outcome.best()
    files = [spec.folder / "results.parquet"]
    board.write_parquet(files[0])
    console.print(board.table())
    if comparison:
        files += comparison.write()
        console.print(comparison.table())
    verdict = [*board.failures(), *board.rung_correlation(), *outcome.verdict()]
    for line in verdict:
        print_line(line)
    try:
        for line in stopping_lines(board):
            print_line(line)
        for step in next_steps(outcome):
            print_line(f"next: {step}")
    except Exception as error:  # advice that can't be given shall not cost the sweep its model
        print_line(f"no advice on what to do next: {one_line(error)}", style="red")
    print_line(f"every epoch: {files[0]}")
    if best is None:
        send(lambda tracker: tracker.close("FAILED", files, verdict))
        return EXIT_NO_RESULT
    try:
        from sweeps.report import page as report  # matplotlib and scipy, which take a second

        page = report.write(outcome)
        files += [page, page.with_name(report.PICTURES)]
        print_line(f"report:      {page}")
    except Exception as error:  # a figure that can't be drawn shall not cost the sweep its model
        print_line(f"no report: {type(error).__name__}: {error}", style="red")
    bundle = best.bundle
    print_line(f"best prompt: {bundle}")
    models: list[str] = []
    try:
        name, lines = best.trial.name, outcome.verdict()
        all_sent &= send(lambda tracker: models.append(tracker.register(bundle, name, lines)))
    except UserError as error:  # no weights here, where they are on the nodes: the bundle is there all the same
        print_line(f"no registered model: {error}", style="yellow")
    all_sent &= send(lambda tracker: tracker.close("FINISHED", files, verdict, outcome.gain()))
    if not all_sent:
        print_line("MLflow did not take everything; --resume sends what is missing", style="red")
        return EXIT_NO_RESULT
    for model in models:
        print_line(f"as a model:  {model}")
    print_line(f"look at it:  {ui_command(tracking_uri(spec))}")
    print_line(f"try it:      python -m lorvp.predict {bundle} {bundle / EXAMPLE}")
    return 0


def close(tracker: Tracker | None, status: str) -> None:
    """End the sweep's run in MLflow, if that can be had now."""
    if tracker is not None:
        tracker.retry(lambda: tracker.close(status, [], []), patience=5)


def end_without_result(jobs: Jobs, sender: Sender, reason: str, spec: Spec, console: Console) -> None:
    """Close the sweep's run as failed, and say why, and which trials failed."""
    jobs.finish(patience=5)
    close(sender.tracker, "FAILED")
    console.print(reason, style="red", markup=False, highlight=False)
    with suppress(Exception):  # of a disk that gives nothing back
        for line in Leaderboard.read(spec).failures():
            console.print(line, highlight=False, markup=False)


@contextmanager
def hide_module(module: str) -> Iterator[None]:
    """Have modules that are imported meanwhile find `module` not installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # Python's own way to say so
    try:
        yield
    finally:
        del sys.modules[module]


def one_line(error: BaseException) -> str:
    """Return an error in a line: its kind, and the last line of what it says."""
    lines = without_passwords(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
