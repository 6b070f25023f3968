"""python sweeps/launch.py SPEC: carries out a sweep, from its YAML file to the best prompt in MLflow."""

from __future__ import annotations

import json
import shutil
import sys
import traceback
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import profile as profiles
from cluster.base import cluster_class, make_cluster
from cluster.job_manager import JobManager
from cluster.snapshot import snapshot
from lorvp import __version__
from lorvp.data.store import read_manifest
from lorvp.errors import UserError
from lorvp.utils import cli
from lorvp.utils.files import give_libraries_caches, replacing, write_json
from sweeps import lock
from sweeps.folder import RECORD, Command, read_record
from sweeps.plan.duplicates import duplicates_line
from sweeps.plan.memory import memory_line
from sweeps.run import status
from sweeps.run.signals import EXIT_INTERRUPTED, SignalHandler
from sweeps.spec import file as spec_file
from sweeps.spec.model import Spec
from sweeps.tracking.retry import first_line

EXIT_BAD_INPUT = 2
EXIT_ERROR = 1
PLACE = {"name", "output"}
"""Keys that say where a sweep's folder is: it may have been moved or renamed since."""
EXTENDABLE = {"search": {"trials", "concurrent", "seconds"}, "failure_limit": {"share", "trials"}}
"""Keys that may differ when a sweep is resumed: none of them changes what a trial is."""

COMMAND = "lorvp-sweep"
"""What pip installs this as: a shell can complete that, as it can't `python sweeps/launch.py`."""

app = typer.Typer(add_completion=Path(sys.argv[0]).name == COMMAND, pretty_exceptions_enable=False)
console = cli.make_console()


def show_version(asked: bool) -> None:
    """Print the version and exit, if it was asked for."""
    if asked:
        print(f"{COMMAND} {__version__}")
        raise typer.Exit


@app.command()
def main(
    file: Annotated[Path, typer.Argument(metavar="SPEC", help="the sweep's YAML file")],
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="replace a value of the spec", autocompletion=spec_file.settable_keys
        ),
    ] = [],  # noqa: B006  typer's own form
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done, and do nothing")] = False,
    no_estimate: Annotated[
        bool, typer.Option("--no-estimate", help="with --dry-run: don't train a few steps to tell what it will take")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the sweep of this name")] = False,
    leave_running: Annotated[
        bool, typer.Option("--leave-running", help="on a signal, leave the jobs to be re-attached by --resume")
    ] = False,
    show_status: Annotated[bool, typer.Option("--status", help="show every trial and its job")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="end the sweep's jobs, and its driver")] = False,
    follow: Annotated[str, typer.Option(metavar="TRIAL", help="show a trial's log, as it grows")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="run the driver as a job, too, and return")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """Carries out the sweep that SPEC describes."""
    try:
        spec = spec_file.load(file, overrides)
        if dry_run:
            show_plan(spec)
            warn_of_duplicates(spec)
            if not no_estimate:
                console.print(estimate_line(spec), highlight=False, markup=False)
            return
        if show_status or cancel or follow:
            manager = make_job_manager(spec, read_record(spec.folder)["id"])
            if follow:
                status.follow(spec, follow, console)
                return
            if cancel:
                console.print(f"{status.cancel(spec, manager)} trials left unfinished; --resume goes on with them")
            console.print(status.table(spec, manager))
            return
        check_inputs(spec)
        if not resume:
            warn_of_duplicates(spec)
        with sweep_folder(spec, resume, Command(str(file), overrides)) as sweep_id:
            if detach:
                options = [f"--set={override}" for override in overrides] + ["--leave-running"] * leave_running
                start_detached(spec, sweep_id, file, options)
                return
            give_libraries_caches()
            signals = SignalHandler()
            # Imported here: a spec that is refused shall not wait for Ray and Optuna.
            from sweeps.run import driver

            manager, text = make_job_manager(spec, sweep_id), file.read_text()
            code = driver.run(spec, sweep_id, text, manager, signals, leave_running, console)
    except UserError as error:
        cli.print_error(error)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        console.print("interrupted before a job was submitted; --resume goes on", highlight=False)
        code = EXIT_INTERRUPTED
    except Exception as error:  # before the first job: of a library, a disk, or a fault of ours
        place = traceback.extract_tb(error.__traceback__)[-1]
        cli.print_error(UserError(f"{type(error).__name__}: {first_line(error)} ({place.filename}:{place.lineno})"))
        raise typer.Exit(EXIT_ERROR) from None
    raise typer.Exit(code)


def start_detached(spec: Spec, sweep_id: str, file: Path, options: list[str]) -> None:
    """Submit a driver that goes on with the sweep just begun. Raises UserError where it can't be a job."""
    profile = profiles.load(spec.cluster)
    if not cluster_class(profile).runs_drivers:
        raise UserError(f"cluster: {spec.cluster} is of kind {profile.kind}, which can't run the driver as a job")
    with replacing(spec.folder / "spec.yaml") as temporary:  # the user's own may be edited before the job starts
        shutil.copyfile(file, temporary)
    snapshot(spec.folder / "code", spec.modules())
    arguments = [str(spec.folder / "spec.yaml"), "--resume", *options]
    try:
        job_id, log = cluster_class(profile).submit_driver(profile, spec.folder, sweep_id, arguments)
    except OSError as error:
        raise UserError(f"cluster: {spec.cluster}: the driver can't be a job: {error}") from None
    write_json(spec.folder / status.DRIVER_JOB, {"id": job_id, "log": log.name})
    console.print(f"the driver is job {job_id}; --status shows the sweep, --cancel ends it, {log} is its log")


def show_plan(spec: Spec) -> None:
    """Print the resolved space, the number of trials and one example config."""
    console.print(f"sweep {spec.name}: {spec.search.algorithm}, objective {spec.objective}, in {spec.folder}")
    console.print("space:")
    for name, axis in spec.ordered_axes().items():
        for one in axis.ranges or [axis]:
            shown = one.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)
            when = " and ".join(f"{k} in {v}" for k, v in shown.pop("when", {}).items())
            ((kind, value),) = shown.items()
            console.print(f"  {name}: {kind} {json.dumps(value)}{f'  when {when}' if when else ''}", markup=False)
    controls = spec.control_configs()
    console.print(f"trials: {spec.number_of_trials()}, and {len(controls)} of the control")
    if spec.confirm:
        seeds = ", ".join(map(str, spec.seeds))
        console.print(f"confirmation: up to {spec.number_of_confirmations()} trials more, under seeds {seeds}")
    console.print("one config:")
    console.print_json(spec.trial_config(spec.example()).model_dump_json())
    console.print(memory_line(spec), markup=False, highlight=False)
    profile = profiles.load(spec.cluster)
    batch_file = cluster_class(profile).batch_file(profile, spec.folder)
    if batch_file is not None:
        console.print(f"one batch file, by profile {spec.cluster}:")
        console.print(batch_file, markup=False, highlight=False, soft_wrap=True)


def estimate_line(spec: Spec) -> str:
    """Return what the sweep will take, in a line; or why that can't be told: no data, no weights, or another error."""
    try:
        check_inputs(spec)
        from sweeps.simulate import __main__ as simulate  # it takes Ray, Optuna and torch

        return simulate.estimate(spec)
    except Exception as error:  # whatever keeps a trial from running here; the plan is no worse for it
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"no estimate: {lines[0]}"


def warn_of_duplicates(spec: Spec) -> None:
    """Print that validation images are nearly training images, if more than a few are."""
    line = duplicates_line(spec)
    if line:
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)


def check_inputs(spec: Spec) -> None:
    """Raise UserError for data or weights that aren't there, before anything is written."""
    for config in [spec.trial_config(spec.example()), *spec.control_configs()]:
        root, checkpoint = config.dataset.root, config.backbone.checkpoint
        if root is not None and config.dataset.name == "store":
            read_manifest(root)
        if root is not None and config.dataset.name == "image_folder" and not root.is_dir():
            raise UserError(f"trial.dataset.root: no such folder {root}; point it at the images")
        if checkpoint is not None and not checkpoint.is_file():
            raise UserError(f"trial.backbone.checkpoint: no such file {checkpoint}")
    for module in spec.modules():
        if not module.is_file():
            raise UserError(f"trial.backbone.module: no such file {module}")
    spec_file.check_hub(spec)


@contextmanager
def sweep_folder(spec: Spec, resume: bool, command: Command) -> Iterator[str]:
    """Lock the sweep's folder, new or resumed, for this driver; yield the sweep's id. Raises UserError."""
    values = spec.model_dump(mode="json", by_alias=True)
    if resume:
        recorded = read_record(spec.folder)
        check_same_sweep(spec, recorded["spec"], values)
    elif (spec.folder / RECORD).exists():
        raise UserError(
            f"{spec.folder}: this sweep was started before; --resume goes on with it, --set name=NAME starts another"
        )
    with ExitStack() as stack:
        created = not spec.folder.exists()
        try:
            spec.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.held(spec.folder))
        except lock.Held as other:
            raise UserError(f"{spec.folder}: another driver runs this sweep: {other}") from None
        except OSError as error:
            raise UserError(f"output: {spec.folder} can't be written ({error.strerror})") from None
        sweep_id = recorded["id"] if resume else uuid.uuid4().hex
        write_json(spec.folder / RECORD, {"id": sweep_id, "spec": values, "command": asdict(command)})
        try:
            yield sweep_id
        except Exception:
            begun = (spec.folder / status.DRIVER_JOB).exists() or (spec.trials.is_dir() and any(spec.trials.iterdir()))
            if not resume and not begun:
                undo_start(spec, created)
            raise


def undo_start(spec: Spec, made: bool) -> None:
    """Remove the folder of a sweep that never began; of one that was there before, what a driver has put into it."""
    if made:
        shutil.rmtree(spec.folder, ignore_errors=True)
    else:
        shutil.rmtree(spec.folder / "code", ignore_errors=True)
        for name in (RECORD, lock.LOCK):
            (spec.folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # it may hold other sweeps
        spec.output.rmdir()


def make_job_manager(spec: Spec, sweep_id: str) -> JobManager:
    """Make the job manager of the sweep, on the cluster that its profile describes."""
    profile = profiles.load(spec.cluster)
    snapshot(spec.folder / "code", spec.modules())
    return JobManager(spec.trials, make_cluster(profile, spec.folder, sweep_id, spec.search.concurrent, spec.pack))


def check_same_sweep(spec: Spec, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError when a resumed sweep would train something else than it did before."""
    for key, value in now.items():
        if key in PLACE:
            continue
        allowed = EXTENDABLE.get(key, set())
        old = before.get(key)
        if key == "confirm" and old is None and value is not None:
            if not value["added_later"]:
                raise UserError(
                    f"{spec.folder}: confirm: this sweep was started without it; --set confirm.added_later=true "
                    "confirms it all the same"
                )
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            differing = [k for k in value.keys() | old.keys() if value.get(k) != old.get(k) and k not in allowed]
        else:
            differing = [""] if value != old else []
        if differing:
            path = ".".join(part for part in (key, differing[0]) if part)
            raise UserError(
                f"{spec.folder}: {path} is not what this sweep was started with; --set name=NAME starts another"
            )


if __name__ == "__main__":
    app()
