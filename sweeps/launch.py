"""python sweeps/launch.py SPEC: carries out a sweep, from its YAML file to the best prompt in MLflow."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster import profile as profiles
from cluster.code import snapshot
from cluster.folder import TrialFolder
from cluster.relay import Relay, make_cluster
from cluster.slurm import requeue_this_job, sbatch_file, submit_driver
from lorvp.errors import UserError
from lorvp.files import replacing, write_json
from lorvp.store import read_manifest
from sweeps import spec_file, status, triage
from sweeps.memory import memory_line
from sweeps.spec import Spec

EXIT_BAD_INPUT, EXIT_NO_RESULT, EXIT_INTERRUPTED = 2, 1, 130
EXTENDABLE = {"search": {"trials", "concurrent", "seconds"}, "failure_limit": {"share", "trials"}}
"""Keys that may differ when a sweep is resumed: none of them changes what a trial is."""

RECORD = "sweep.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=not sys.stdout.isatty())


@app.command()
def main(
    file: Annotated[Path, typer.Argument(metavar="SPEC", help="the sweep's YAML file")],
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the spec")
    ] = [],  # noqa: B006  typer's own form
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done, and do nothing")] = False,
    no_estimate: Annotated[
        bool, typer.Option("--no-estimate", help="with --dry-run: don't train a few steps to tell what it will take")
    ] = False,
    triaged: Annotated[
        bool, typer.Option("--triage", help="say whether a prompt will beat a linear probe on this data, in minutes")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the sweep of this name")] = False,
    leave_running: Annotated[
        bool, typer.Option("--leave-running", help="on a signal, leave the jobs to be re-attached by --resume")
    ] = False,
    show_status: Annotated[bool, typer.Option("--status", help="show every trial and its job")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="end the sweep's jobs, and its driver")] = False,
    follow: Annotated[str, typer.Option(metavar="TRIAL", help="show a trial's log, as it grows")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="run the driver as a job, too, and return")] = False,
) -> None:
    """Carries out the sweep that SPEC describes."""
    try:
        spec = spec_file.load(file, overrides)
        if dry_run:
            show_plan(spec)
            if not no_estimate:
                console.print(estimated(spec), highlight=False, markup=False)
            return
        if show_status or cancel or follow:
            relay = make_relay(spec, existing_sweep(spec)["id"])
            if follow:
                status.follow(spec, follow, console)
                return
            if cancel:
                console.print(f"{status.cancel(spec, relay)} trials left unfinished; --resume goes on with them")
            console.print(status.table(spec, relay))
            return
        check_inputs(spec)
        if triaged:
            triage.show(spec, console)
            return
        with sweep_folder(spec, resume) as sweep_id:
            if detach:
                options = [f"--set={override}" for override in overrides] + ["--leave-running"] * leave_running
                start_detached(spec, sweep_id, file, options)
                return
            code = carry_out(spec, sweep_id, file.read_text(), leave_running)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    if code == EXIT_INTERRUPTED:  # perhaps in the middle of Ray's start: its C++ part would abort the interpreter's end
        sys.stdout.flush()
        os._exit(code)
    raise typer.Exit(code)


def start_detached(spec: Spec, sweep_id: str, file: Path, options: list[str]) -> None:
    """Submits a driver that goes on with the sweep just begun. Raises UserError where it can't be a job."""
    profile = profiles.load(spec.cluster)
    if profile.kind != "slurm":
        raise UserError(f"cluster: {spec.cluster} is no SLURM profile, and --detach makes the driver a SLURM job")
    with replacing(spec.folder / "spec.yaml") as temporary:  # the user's own may be edited before the job starts
        shutil.copyfile(file, temporary)
    snapshot(spec.folder / "code")
    arguments = [str(spec.folder / "spec.yaml"), "--resume", *options]
    try:
        job_id, log = submit_driver(profile, spec.folder, sweep_id, arguments)
    except OSError as error:
        raise UserError(f"cluster: {spec.cluster}: the driver can't be a job: {error}") from None
    write_json(spec.folder / status.DRIVER_JOB, {"id": job_id, "log": str(log)})
    console.print(f"the driver is job {job_id}; --status shows the sweep, --cancel ends it, {log} is its log")


def show_plan(spec: Spec) -> None:
    """Prints the resolved space, the number of trials and one example config."""
    console.print(f"sweep {spec.name}: {spec.search.algorithm}, objective {spec.objective}, in {spec.folder}")
    console.print("space:")
    for name, axis in spec.ordered_axes().items():
        shown = axis.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)
        when = " and ".join(f"{k} in {v}" for k, v in shown.pop("when", {}).items())
        ((kind, value),) = shown.items()
        console.print(f"  {name}: {kind} {json.dumps(value)}{f'  when {when}' if when else ''}", markup=False)
    controls = spec.control_configs()
    console.print(f"trials: {spec.number_of_trials()}, and {len(controls)} of the control")
    if spec.confirm:
        seeds = ", ".join(map(str, spec.confirm.seeds))
        console.print(f"confirmation: up to {spec.number_of_confirmations()} trials more, under seeds {seeds}")
    console.print("one config:")
    console.print_json(spec.trial_config(spec.example()).model_dump_json())
    console.print(memory_line(spec), markup=False, highlight=False)
    profile = profiles.load(spec.cluster)
    if profile.kind == "slurm":
        console.print(f"one sbatch file, by profile {spec.cluster}:")
        console.print(sbatch_file(profile, spec.folder), markup=False, highlight=False, soft_wrap=True)


def estimated(spec: Spec) -> str:
    """What the sweep will take, in a line; or why that can't be told: no data, no weights, or another error."""
    try:
        check_inputs(spec)
        from sweeps import simulate  # it takes Ray, Optuna and torch

        return simulate.estimate(spec)
    except Exception as error:  # whatever keeps a trial from running here; the plan is no worse for it
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"no estimate: {lines[0]}"


def check_inputs(spec: Spec) -> None:
    """Raises UserError for data or weights that aren't there, before anything is written."""
    for config in [spec.trial_config(spec.example()), *spec.control_configs()]:
        root, checkpoint = config.dataset.root, config.backbone.checkpoint
        if config.dataset.name == "store":
            read_manifest(root)
        if config.dataset.name == "image_folder" and not root.is_dir():
            raise UserError(f"trial.dataset.root: no such folder {root}; point it at the images")
        if checkpoint is not None and not checkpoint.is_file():
            raise UserError(f"trial.backbone.checkpoint: no such file {checkpoint}")


@contextmanager
def sweep_folder(spec: Spec, resume: bool) -> Iterator[str]:
    """The sweep's folder, new or resumed, locked for this driver; gives the sweep's id."""
    values = spec.model_dump(mode="json", by_alias=True)
    if resume:
        before = existing_sweep(spec)
        check_same_sweep(spec, before["spec"], values)
    elif (spec.folder / RECORD).exists():
        raise UserError(
            f"{spec.folder}: this sweep was started before; --resume goes on with it, --set name=NAME starts another"
        )
    try:
        spec.folder.mkdir(parents=True, exist_ok=True)
        lock = open(spec.folder / "driver.lock", "a+")  # noqa: SIM115  held until the sweep ends
    except OSError as error:
        raise UserError(f"output: {spec.folder} can't be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError(f"{spec.folder}: another driver runs this sweep: {lock.read().strip()}") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        sweep_id = before["id"] if resume else uuid.uuid4().hex
        write_json(spec.folder / RECORD, {"id": sweep_id, "spec": values})
        try:
            yield sweep_id
        except UserError:
            if not resume:  # it never began
                shutil.rmtree(spec.folder)
                with suppress(OSError):  # it may hold other sweeps
                    spec.output.rmdir()
            raise


def existing_sweep(spec: Spec) -> dict:
    """What was recorded of the sweep when it was started: its id and its spec."""
    try:
        return json.loads((spec.folder / RECORD).read_text())
    except FileNotFoundError:
        raise UserError(f"{spec.folder}: no such sweep; it is started without --resume") from None


def make_relay(spec: Spec, sweep_id: str) -> Relay:
    profile = profiles.load(spec.cluster)
    return Relay(spec.trials, make_cluster(profile, spec.folder, sweep_id, spec.search.concurrent, spec.pack))


def check_same_sweep(spec: Spec, before: dict, now: dict) -> None:
    """Raises UserError when a resumed sweep would train something else than it did before."""
    for key, value in now.items():
        allowed = EXTENDABLE.get(key, set())
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            differing = [k for k in value.keys() | old.keys() if value.get(k) != old.get(k) and k not in allowed]
        else:
            differing = [""] if value != old else []
        if differing:
            path = ".".join(part for part in (key, differing[0]) if part)
            raise UserError(
                f"{spec.folder}: {path} is not what this sweep was started with; --set name=NAME starts another"
            )


def carry_out(spec: Spec, sweep_id: str, spec_text: str, leave_running: bool) -> int:
    """Runs the sweep to its end and returns the exit code."""
    # Imported here: a spec that is refused shall not wait for MLflow and Ray.
    from sweeps import confirm
    from sweeps.comparison import Comparison
    from sweeps.follow import Follower
    from sweeps.leaderboard import Leaderboard
    from sweeps.tracking import Tracker

    ending = Ending()
    tracker = Tracker(spec, sweep_id, spec_text)
    console.print(f"sweep {spec.name} in {spec.folder}, MLflow at {tracker.uri}", highlight=False)
    relay = make_relay(spec, sweep_id)
    follower = Follower(spec, relay, tracker, console)
    follower.start()
    try:
        for config in spec.control_configs():
            TrialFolder.request(spec.trials, config)
        if spec.confirm is None:
            run_search(spec, ending)
        else:
            choices = confirm.search_and_confirm(spec, partial(run_search, spec, ending), follower)
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
        tracker.try_to(lambda: tracker.close(status_of_run, []), patience=5)
        if follower.given_up:
            return give_up(spec, follower.given_up)
        if ending.time_limit_nears:
            console.print("the time limit nears: this driver is requeued", highlight=False)
            requeue_this_job()
        else:
            console.print(f"interrupted; --resume goes on where {spec.folder} stands", highlight=False)
        if not isinstance(error, KeyboardInterrupt):
            raise
        return EXIT_INTERRUPTED
    board = Leaderboard.read(spec)
    parquet = spec.folder / "results.parquet"
    board.write_parquet(parquet)
    files, found = [parquet], board
    console.print(board.table())
    if spec.confirm:
        found = Comparison.of(board, choices)
        files += found.write()
        console.print(found.table())
    for line in [*board.failures(), *board.trust(), *found.verdict()]:
        console.print(line, highlight=False, markup=False)
    console.print(f"every epoch: {parquet}", highlight=False)
    best = found.best()
    if best is not None:
        console.print(f"best prompt: {best.trial.newest().bundle}", highlight=False)
        all_sent &= tracker.try_to(lambda: tracker.log_best(best.trial))
    all_sent &= tracker.try_to(lambda: tracker.close("FINISHED" if best else "FAILED", files))
    if not all_sent:
        console.print("MLflow did not take everything; --resume sends what is missing", style="red")
        return EXIT_NO_RESULT
    if best is not None:
        console.print(f"as a model:  {tracker.model_uri}", highlight=False)
    console.print(f"look at it:  {tracker.ui_command()}", highlight=False)
    return 0 if best is not None else EXIT_NO_RESULT


def give_up(spec: Spec, reason: str) -> int:
    """Says why the sweep was ended early, and what failed."""
    from sweeps.leaderboard import Leaderboard

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
        signal.signal = lambda signum, handler: None if signum in self.SIGNALS else set_handler(signum, handler)
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


def run_search(spec: Spec, ending: Ending) -> None:
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
    files = spec.folder / "ray"
    shutil.rmtree(files, ignore_errors=True)  # of a driver that was killed: nothing is restored from it
    (files / "session").mkdir(parents=True)
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
    shutil.rmtree(files, ignore_errors=True)


if __name__ == "__main__":
    app()
