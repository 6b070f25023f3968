"""One trial trained by several processes, a GPU each: this one, which writes and decides, and those that it starts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Unpack

import torch
from torch import distributed as dist

from lorvp.config import TrialConfig
from lorvp.result import EpochResult
from lorvp.training import loop
from lorvp.training.shared import SharedResources, load
from lorvp.training.trainer import Options

LEFT_TO_THE_FIRST = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a scheduler or a terminal sends to all processes of a job: the first one saves, and ends the others."""
PATIENCE = timedelta(minutes=10)
"""How long a process waits for another that does not answer."""


def train(
    config: TrialConfig, processes: int, shared: SharedResources | None = None, **options: Unpack[Options]
) -> Iterator[EpochResult]:
    """`loop.train` by so many processes, this one and others beside it, with a GPU each where there are GPUs.

    The results are those of one process, but for the order in which numbers are added. Raises what training raises,
    and RuntimeError when another of the processes has failed; its own error is on its stderr.
    """
    if processes == 1:
        yield from loop.train(config, shared=shared, **options)
        return
    with tempfile.TemporaryDirectory(prefix="lorvp-") as folder:
        spawn = multiprocessing.get_context("spawn")
        precision = shared and shared.precision
        common = (processes, folder, config, precision, options.get("resume_from"), torch.get_num_threads())
        others = [spawn.Process(target=_take_part, args=(rank, *common)) for rank in range(1, processes)]
        with _blocked(LEFT_TO_THE_FIRST):  # which they inherit, until they ignore them
            for other in others:
                other.start()
        try:
            _join_group(0, processes, folder)
            yield from loop.train(config, shared=shared, **options)
        except RuntimeError as error:
            for rank, other in enumerate(others, start=1):
                other.join(timeout=5)
                if other.exitcode:
                    reason = f"process {rank} of the trial's {processes} has ended with exit code {other.exitcode}"
                    raise RuntimeError(reason) from error
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for other in others:
                other.join(timeout=5)
                other.kill()


def _join_group(rank: int, processes: int, folder: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, f"file://{folder}/group", PATIENCE, processes, rank)


@contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_first() -> None:
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


def _take_part(
    rank: int,
    processes: int,
    folder: str,
    config: TrialConfig,
    precision: str | None,
    resume_from: Path | None,
    threads: int,
) -> None:
    for signum in LEFT_TO_THE_FIRST:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    torch.set_num_threads(threads)
    _join_group(rank, processes, folder)
    for _ in loop.train(config, shared=load(config, precision), resume_from=resume_from):
        pass
    dist.destroy_process_group()
