"""What may fail and is tried again: an error is shown once, in its first line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from lorvp.utils.explain import without_passwords

POLL_SECONDS = 0.5


def first_line(error: Exception) -> str:
    """Return the first line of an error, without SQLAlchemy's preface."""
    text = without_passwords(str(error))
    lines = [line for line in text.strip().splitlines() if not line.startswith("(raised as a result of")]
    return lines[0] if lines else type(error).__name__


class Retry:
    """Tries what may fail and is tried again later. What goes wrong is shown once."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._trouble = ""

    def call(self, action: Callable[[], None]) -> bool:
        """Call it, and return whether it succeeded."""
        try:
            action()
        except Exception as error:  # MLflow, the disk and the cluster fail in their own ways; the next time may be good
            line = first_line(error)
            if line != self._trouble:
                self._trouble = line
                with suppress(OSError):  # of a screen that is gone, or a log on a full disk
                    self._show(f"trying again: {line}")
            return False
        self._trouble = ""
        return True


class PeriodicThread(threading.Thread):
    """Does something every half second, and at once when it is woken, until it is ended."""

    def __init__(self, action: Callable[[], None], show: Callable[[str], None]) -> None:
        super().__init__(name=action.__qualname__, daemon=True)
        self._action = action
        self._retry = Retry(show)
        self._woken = threading.Event()
        self._ended = False

    def run(self) -> None:
        """Run the action until the thread is ended."""
        while not self._ended:
            self._woken.clear()
            self._retry.call(self._action)
            self._woken.wait(POLL_SECONDS)

    def wake(self) -> None:
        """Run the action at once."""
        self._woken.set()

    def end(self) -> None:
        """End it, once what it does now is done."""
        self._ended = True
        self._woken.set()
        if self.is_alive():
            self.join()
