"""Waiting for events: with one limit for all of them, since a slow machine may take its time."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from typing import Protocol, TypeVar

LIMIT = 300.0
"""Seconds; below pytest's own timeout, so that what was waited for is named."""
POLL_SECONDS = 0.05
T = TypeVar("T")


class Watched(Protocol):
    """What ends all waiting when it ends: a driver."""

    def ended(self) -> bool: ...

    def output(self) -> str: ...


def wait_for(
    what: str, condition: Callable[[], T], driver: Watched | None = None, said: Callable[[], str] | None = None
) -> T:
    """What `condition` gives as soon as it is true; fails at the limit, and at once if the `driver` has ended.

    `said` tells what is known when there was no such event: the driver's output, if nothing else.
    """
    said = said or (driver.output if driver else None)
    deadline = time.monotonic() + LIMIT
    while True:
        ended = driver is not None and driver.ended()  # looked at first: what came about before its end counts
        value = condition()
        if value:
            return value
        more = f":\n{said()}" if said else ""
        assert not ended, f"the driver has ended, and there was no {what}{more}"
        assert time.monotonic() < deadline, f"no {what} within {LIMIT:.0f} s{more}"
        time.sleep(POLL_SECONDS)


def answers(address: str) -> bytes:
    """What a server says at `address`; nothing where it doesn't answer yet."""
    try:
        return urllib.request.urlopen(address, timeout=10).read()
    except OSError:
        return b""
