"""Ports of loopback that nobody else takes, nor another run of the tests on this machine."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

FIRST, LAST = 20_000, 32_000
"""Below those that the kernel hands out by itself."""
_reserved: list[ExitStack] = []


def reserve(count: int = 1) -> int:
    """The first of `count` ports in a row. They are this process's until it ends, whether or not something listens."""
    places = (LAST - FIRST) // count
    start = os.getpid() % places
    for place in (*range(start, places), *range(start)):
        first = FIRST + place * count
        if _take(range(first, first + count)):
            return first
    raise OSError(f"none of the ports from {FIRST} to {LAST} is free")


def _take(ports: range) -> bool:
    with ExitStack() as marks:
        try:
            for port in ports:
                # Linux's abstract sockets: as with ports, each is there once, and goes with the process that has it
                mark = marks.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                mark.bind(f"\0lorvp-port-{port}")
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        _reserved.append(marks.pop_all())
        return True
