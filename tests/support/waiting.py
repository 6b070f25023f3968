"""Waiting for events: with one limit for all of them, since a slow machine may take its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

LIMIT_SECONDS = 300.0
POLL_SECONDS = 0.05
T = TypeVar("T")


class Watched(Protocol):
    """What ends all waiting when it ends: a driver."""

    def ended(self) -> bool: ...

    def output(self) -> str: ...


def wait_for(what: str, condition: Callable[[], T], driver: Watched | None = None) -> T:
    """What `condition` gives as soon as it is true; fails at the limit, and at once if the `driver` has ended."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        ended = driver is not None and driver.ended()  # looked at first: what came about before its end counts
        value = condition()
        if value:
            return value
        said = f"; the driver said:\n{driver.output()}" if driver else ""
        assert not ended, f"the driver has ended, and there was no {what}{said}"
        assert time.monotonic() < deadline, f"no {what} within {LIMIT_SECONDS:.0f} s{said}"
        time.sleep(POLL_SECONDS)
