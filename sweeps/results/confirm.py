"""The confirmation of a search: its best configs, and the best control, are trained again under several seeds.

Which ones is written into `confirm.json` in the sweep's folder, before any of them is asked for: the choice is made
once, whatever happens to the driver.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

from cluster.trial_folder import TrialFolder
from lorvp.config import TrialConfig
from lorvp.utils.files import write_json
from sweeps.results.leaderboard import Entry, Leaderboard
from sweeps.spec.model import Spec

RECORD = "confirm.json"


@dataclass(frozen=True)
class Choice:
    """A config to confirm."""

    trial: str
    """The trial of the search that has it."""
    control: bool
    seeds: dict[int, str]
    """The trials that confirm it, by seed; a config that has no use for a seed has the same one for each."""


def choose(spec: Spec) -> list[Choice]:
    """Choose and record the best finished trials of each arm of the search, then that of the control.

    The list is empty where no trial of the search finished.
    """
    board = Leaderboard.read(spec)
    finished = [entry for entry in board.search_entries() if entry.finished]
    choices: list[Choice] = []
    for arm in spec.arms():
        of_arm = (entry for entry in finished if spec.arm(entry.trial.config) == arm)
        choices += islice(_different(spec, of_arm), spec.top)
    if choices and (control := board.best(control=True)):
        choices += _different(spec, [control])
    values = {"search": _extent(spec), "chosen": [asdict(choice) for choice in choices]}
    write_json(spec.folder / RECORD, values)
    return choices


def chosen(spec: Spec) -> list[Choice] | None:
    """Read an earlier driver's choice at the end of this search; None if there is none, or the search is longer now."""
    try:
        values = json.loads((spec.folder / RECORD).read_text())
    except FileNotFoundError:
        return None
    if values["search"] != _extent(spec):
        return None
    return [
        Choice(choice["trial"], choice["control"], {int(seed): name for seed, name in choice["seeds"].items()})
        for choice in values["chosen"]
    ]


def request(spec: Spec, choices: list[Choice], ask: Callable[[TrialConfig], object]) -> set[str]:
    """Ask for the trials that confirm, and return their names."""
    for choice in choices:
        config = TrialFolder(spec.trials / choice.trial).config
        for seed in choice.seeds:
            ask(spec.confirmed(config, seed))
    return {name for choice in choices for name in choice.seeds.values()}


def _extent(spec: Spec) -> dict[str, float | None]:
    """Return the extent of the search: its trials and its limit in seconds."""
    return {"trials": spec.number_of_trials(), "seconds": spec.search.seconds}


def _different(spec: Spec, entries: Iterable[Entry]) -> Iterator[Choice]:
    """Return a choice for each config; those that differ only in a seed are one to confirm."""
    known = []
    for entry in entries:
        config = entry.trial.config
        seeds = {seed: spec.confirmed(config, seed).content_hash() for seed in spec.seeds}
        if seeds not in known:
            known.append(seeds)
            yield Choice(entry.trial.name, entry.control, seeds)
