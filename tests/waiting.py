"""Waiting for what another process does: by looking, up to one limit that no machine should need."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from typing import TypeVar

LIMIT = 400.0
"""Seconds; below pytest's own timeout, so that what was waited for is named."""

T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T], said: Callable[[], str] = str) -> T:
    """What `look` gives, once it is true; else fails with `what` did not come, and with what is known, `said`."""
    deadline = time.monotonic() + LIMIT
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {LIMIT:.0f} s for {what}\n{said()}"
        time.sleep(0.05)
    return found


def answers(address: str) -> bytes:
    """What a server says at `address`; nothing where it doesn't answer yet."""
    try:
        return urllib.request.urlopen(address, timeout=10).read()
    except OSError:
        return b""
