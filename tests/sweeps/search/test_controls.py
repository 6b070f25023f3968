"""When the controls are asked for: beside the first trials of the search, and not before them."""

from __future__ import annotations

import pytest

from sweeps.search.controls import WithControls


class Place:
    """Notes what it is asked for; a trial is its config."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def request(self, config: str) -> str:
        self.asked.append(config)
        return config

    def give_up(self, trial: str) -> None:
        self.asked.append(f"not {trial}")

    def wait(self) -> set[str]:
        self.asked.append("wait")
        return set()


@pytest.mark.parametrize(
    ("jobs", "trials", "asked"),
    [
        (1, "abc", "a C D b c"),
        (2, "abc", "a C D b c"),
        (4, "abc", "a b C D c"),
        (32, "abc", "a b c"),  # the search has asked for all that it wants at a time: with its wait
    ],
)
def test_controls_are_the_last_of_the_jobs_that_start_together(jobs, trials, asked):
    place = Place()
    with_controls = WithControls(place, ["C", "D"], place.request, jobs)
    for config in trials:
        assert with_controls.request(config) == config
    assert place.asked == asked.split()
    with_controls.wait()
    assert place.asked == [*asked.split(), *("CD" if "C" not in asked else ""), "wait"]
    with_controls.give_up("a")
    with_controls.request_controls()
    assert place.asked[-1] == "not a"
    assert place.asked.count("C") == place.asked.count("D") == 1
