"""How a driver ends on a signal: in order at the first, at once at the second."""

from __future__ import annotations

import os
import signal

EXIT_INTERRUPTED = 130


class SignalHandler:
    """Makes a signal raise KeyboardInterrupt in the main thread, so that the jobs are ended before the driver is.

    A second signal ends the process at once and leaves the jobs as they are. A signal that was ignored when the driver
    was started (nohup's SIGHUP, a background job's SIGINT) stays ignored.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for signum in self.SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._interrupt)

    @property
    def time_limit_nears(self) -> bool:
        """Whether this driver is a job that will be ended soon; the sweep's own jobs need not be."""
        return self.signal == signal.SIGUSR2 and "SLURM_JOB_ID" in os.environ

    def exit_on_next(self) -> None:
        """Make the next signal end the driver at once, as the driver is ending by itself."""
        self.signal = self.signal or signal.SIGINT

    def _interrupt(self, signum: int, frame: object) -> None:
        if self.signal is not None:
            os.write(2, b"\nended at once: jobs may run on; --cancel ends them, --resume goes on with them\n")
            os._exit(EXIT_INTERRUPTED)
        self.signal = signal.Signals(signum)
        raise KeyboardInterrupt
