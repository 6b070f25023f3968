"""When a trial is told to leave."""

from __future__ import annotations

import itertools
from collections.abc import Callable


def from_call(number: int) -> Callable[[], bool]:
    """Return a `should_stop` that says so from the time on that it is asked for the `number`-th time."""
    asked = itertools.count(1)
    return lambda: next(asked) >= number
