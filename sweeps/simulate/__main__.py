"""python -m sweeps.simulate SPEC --gpus N: what a sweep would take and find, by a replay in virtual time."""

from __future__ import annotations

import math
import os
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from cluster import profile as profiles
from cluster.trial_folder import State
from lorvp.errors import UserError
from lorvp.utils import cli
from sweeps.simulate.curves import AssumedCurves, Curves, RecordedCurves
from sweeps.simulate.replay import Place, ReplayResult, replay
from sweeps.spec import file as spec_file
from sweeps.spec.model import Spec

ROWS = 10

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = cli.make_console()


@app.command()
def main(
    file: Annotated[Path, typer.Argument(metavar="SPEC", help="the sweep's YAML file")],
    gpus: Annotated[int, typer.Option(help="GPUs that there are")],
    curves: Annotated[
        Path | None, typer.Option(metavar="FILE", help="results.parquet of a sweep; default: assumed curves")
    ] = None,
    submission_delay: Annotated[
        float, typer.Option(min=0, help="seconds from a job's submission until it may start")
    ] = 0,
    start_up: Annotated[float, typer.Option(min=0, help="seconds that a job takes before its first step")] = 0,
    failure_rate: Annotated[float, typer.Option(min=0, max=1, help="share of a job's starts that fail on the way")] = 0,
    epoch_seconds: Annotated[
        float | None, typer.Option(help="seconds of every epoch; default: as recorded, 60 for assumed curves")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of failures and assumed curves; the search has its own")] = 0,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the spec")
    ] = [],  # noqa: B006  typer's own form
) -> None:
    """Replays the sweep that SPEC describes in virtual time, against recorded or assumed learning curves."""
    spec = spec_file.load(file, overrides)
    for option, value in (("--submission-delay", submission_delay), ("--start-up", start_up)):
        if not math.isfinite(value):
            raise UserError(f"{option} {value}: must be seconds")
    if epoch_seconds is not None and not 0 < epoch_seconds < math.inf:
        raise UserError(f"--epoch-seconds {epoch_seconds:g}: must be above 0")
    learning_curves = (
        RecordedCurves(curves, spec, epoch_seconds) if curves else AssumedCurves(spec, epoch_seconds or 60, seed)
    )
    place = Place(profiles.load(spec.cluster), gpus, submission_delay, start_up, failure_rate)
    show(replay(spec, learning_curves, place, seed), spec, learning_curves, place)


def estimate(spec: Spec) -> str:
    """Return what the sweep will take, in a line, by a few training steps of its example config on this machine.

    A cluster is taken to have a free GPU for each job in flight. On this machine jobs share the CPU's cores, or take
    turns on its GPUs. Nothing is written. Raises what `lorvp.estimate.calibrate.calibrate` raises.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported: an estimate downloads nothing
    start = time.perf_counter()
    import torch

    from lorvp.estimate.calibrate import calibrate

    import_seconds = time.perf_counter() - start
    profile = profiles.load(spec.cluster)
    jobs = profile.jobs_in_flight or spec.search.concurrent
    cores = len(os.sched_getaffinity(0))
    local = profile.kind == "local"
    threads = cores // jobs if local else min(cores, profile.cpus_per_gpu * profile.gpus)
    measured = calibrate(spec.trial_config(spec.example()), max(1, threads))
    gpus = min(jobs, torch.cuda.device_count() or jobs) if local else jobs * profile.gpus
    curves = AssumedCurves(spec, measured.epoch_seconds, seed=0)
    result = replay(spec, curves, Place(profile, gpus, start_up=import_seconds + measured.load_seconds))
    makespan = timedelta(seconds=round(result.makespan))
    return (
        f"estimate: {result.gpu_seconds / 3600:.3g} GPU-hours; started now, it ends in {makespan}, at "
        f"{datetime.now() + makespan:%Y-%m-%d %H:%M}: by {measured.steps} steps on this machine's {measured.device}, "
        f"{measured.epoch_seconds:.3g} s an epoch, assumed learning curves, {gpus // profile.gpus} jobs at once"
    )


def show(result: ReplayResult, spec: Spec, curves: Curves, place: Place) -> None:
    """Print what the replay came to."""
    jobs = place.profile.jobs_in_flight or spec.search.concurrent
    rule = spec.early_stopping.rule
    console.print(
        f"sweep {spec.name} in virtual time: {spec.search.algorithm}, early stopping {rule}, {place.gpus} GPUs, "
        f"search.concurrent {spec.search.concurrent}, {jobs} jobs in flight",
        highlight=False,
    )
    console.print(curves.describe(), highlight=False, markup=False)
    for name, value in summary(result, spec.confirm is not None).items():
        console.print(f"{name + ':':17}{value}", highlight=False)
    if result.given_up:
        console.print(f"given up: {result.given_up}", style="red", highlight=False)
    if result.best:
        console.print(best_table(result, spec.objective))


def summary(result: ReplayResult, confirmed: bool = False) -> dict[str, str]:
    """Return the outcome in words, by name."""
    ended = {state: result.states.count(state) for state in State}
    trials = f"{ended[State.FINISHED]} finished, {ended[State.STOPPED]} stopped early, {ended[State.FAILED]} failed"
    lines = {"trials": f"{len(result.states)} with the control{' and the confirmation' * confirmed}: {trials}"}
    if result.repeated:
        lines["asked for again"] = f"{result.repeated} points of the space, each the config of an earlier trial"
    if result.invalid:
        lines["not valid"] = f"{result.invalid} points of the space"
    if result.beyond_curve:
        lines["short curves"] = f"{result.beyond_curve} trials went on with the last value of their curve"
    return lines | {
        "failed starts": str(result.failed_starts),
        "GPU-hours": f"{result.gpu_seconds / 3600:.4g}",
        "makespan": str(timedelta(seconds=round(result.makespan))),
        "utilisation": f"{100 * result.utilisation:.1f} % of {result.gpus} GPUs x makespan trained",
    }


def best_table(result: ReplayResult, objective: str) -> Table:
    """Return the best value against GPU-seconds, from the first epoch on, in equal ratios."""
    table = Table(box=None)
    table.add_column("GPU-seconds", justify="right")
    table.add_column(f"best {objective} so far", justify="right")
    first, last = result.best[0][0], result.gpu_seconds
    for gpu_seconds in [first, *np.geomspace(first, last, ROWS)[1:-1], last] if first < last else [last]:
        table.add_row(f"{gpu_seconds:.0f}", f"{result.best_after(gpu_seconds):.4g}")
    return table


if __name__ == "__main__":
    cli.run(app)
