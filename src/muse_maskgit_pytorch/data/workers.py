"""Processes that load data, and the signals that are not theirs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def starting_processes() -> Iterator[None]:
    """Within the block start those that load data: SIGTERM is blocked in all of their threads.

    Blocking it in the new process would be too late: torch starts threads there before it calls
    `leave_signals_to_the_run`.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_the_run(worker: int) -> None:
    """In a process that loads data: what a terminal or a scheduler sends to all is the run's.

    It ends as the run tells it to, or with the run. Where a signal's sender is not to be had
    (macOS), SIGTERM ends it as before.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    run = multiprocessing.parent_process()
    if run is not None and hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_for, args=(run.pid,), daemon=True).start()


def _end_for(pid: int | None) -> None:
    """Wait for a SIGTERM from the process ``pid``, and end."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != pid:
        pass
    os._exit(0)
