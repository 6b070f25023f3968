"""That a sweep has one driver: a lock on a file, or on a disk that has no locks a file that only one can make."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from lorvp.utils.files import create, read_line, replacing

LOCK, ALIVE = "driver.lock", "driver.alive"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""What disks say that have no locks."""
BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0
"""Without a beat, after which a driver on another machine counts as dead."""


@dataclass(frozen=True)
class Holder:
    """A driver: its process, and a name that no other driver has."""

    host: str
    process: int
    started: float
    """When the process started, in seconds since 1970 by its own machine's clock."""
    name: str

    @classmethod
    def this_process(cls) -> Holder:
        """Describe this process, under a new unique name."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), uuid.uuid4().hex)

    def here(self) -> bool:
        """Return whether the driver runs on this machine."""
        return self.host == socket.gethostname()

    def lives_here(self) -> bool:
        """Say whether it is a process of this machine; one that has only got its number since is none."""
        try:
            return self.here() and abs(psutil.Process(self.process).create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


class Held(Exception):
    """Another driver has the sweep; its text says which."""


@contextmanager
def held(sweep: Path) -> Iterator[None]:
    """Be the sweep's driver meanwhile. Raises Held where another is, and OSError where the folder can't be written."""
    me = Holder.this_process()
    with open(sweep / LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise Held(str(_read(sweep / LOCK) or "an unknown process")) from None
            with _alive(sweep, me):
                yield
        else:
            lock.truncate(0)
            lock.write(_line(me) + "\n")
            lock.flush()
            yield


def holder(sweep: Path) -> Holder | None:
    """Find the driver that runs the sweep; None if there is none."""
    try:
        with open(sweep / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            return _read(sweep / LOCK)
        driver = _read(sweep / ALIVE)
        return driver if driver and not _dead(sweep, driver) else None
    return None


@contextmanager
def _alive(sweep: Path, me: Holder) -> Iterator[None]:
    """Hold the file that only one can make, and show by its time that this process lives."""
    path, line = sweep / ALIVE, _line(me)
    if not create(path, line):
        other = _read(path)
        # what a dead driver left may be replaced by one only: by who makes the file of this name
        if other is None or not _dead(sweep, other) or not create(sweep / f".{ALIVE}.{other.name}", me.name):
            raise Held(str(other or "an unknown process"))
        with replacing(path) as temporary:
            temporary.write_text(f"{line}\n")
        (sweep / f".{ALIVE}.{other.name}").unlink()
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(path)

    beats = threading.Thread(target=beat, name="beat", daemon=True)
    beats.start()
    try:
        yield
    finally:
        over.set()
        beats.join()
        with suppress(OSError):
            path.unlink()


def _dead(sweep: Path, driver: Holder) -> bool:
    """Say whether a driver is dead: its process, where that would be one of this machine's, else by its last beat.

    The disk's clock is asked, since those of two machines may differ by minutes.
    """
    if driver.here():
        return not driver.lives_here()
    now = sweep / f".{ALIVE}.now.{uuid.uuid4().hex[:8]}"
    try:
        now.touch()
        return now.stat().st_mtime - (sweep / ALIVE).stat().st_mtime > DEAD_SECONDS
    except FileNotFoundError:
        return True
    finally:
        now.unlink(missing_ok=True)


def _line(driver: Holder) -> str:
    return json.dumps(asdict(driver))


def _read(path: Path) -> Holder | None:
    line = read_line(path)
    try:
        return Holder(**json.loads(line)) if line else None
    except (ValueError, TypeError):  # of an earlier version of this project
        return None
