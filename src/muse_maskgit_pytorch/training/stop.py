"""Ctrl-C and other signals that end a run: answered at once, obeyed where nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Stop:
    """What becomes of SIGINT, SIGTERM and SIGHUP while a run is `listening`.

    Before the steps `begin` there is nothing to lose: the first signal ends the run. From then on
    it ends after the step in progress. A second one does not wait for that, but it is obeyed only
    where weights are whole (`free`), so that all the steps before can still be saved.

    Args:
        shown: whether to answer on the terminal; one process does for all.
    """

    def __init__(self, shown: bool):
        self.shown = shown
        self.asked = self._begun = self._free = False

    def begin(self) -> None:
        """From here on steps are made."""
        self._begun = True

    @contextmanager
    def free(self) -> Iterator[None]:
        """Within the block, up to `hold`, a second signal ends the run at once."""
        self._free = True
        try:
            yield
        finally:
            self._free = False

    def hold(self) -> None:
        """What follows in the block must not end halfway."""
        self._free = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block signals come here; in a thread that is not the main one none do."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # as nohup sets it
            numbers.append(hangup)
        self.asked = self._begun = self._free = False
        self._process = os.getpid()
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._ask) for number in numbers if main}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._process:  # one that loads data, and has just been forked
            return
        again, self.asked = self.asked, True
        if not self._begun:
            self._answer("stopping: no step was made yet, so nothing is lost")
            raise KeyboardInterrupt
        if not again:
            self._answer("stopping after this step; again to stop now and lose it")
        elif self._free:
            self._free = False  # a third one must not disturb what is put in order now
            self._answer("stopping now: the steps before this one are saved")
            raise KeyboardInterrupt
        else:
            self._answer("one moment: saving, so that nothing is lost")

    def _answer(self, text: str) -> None:
        """Write a line: past Python's buffers, which may be in use as the signal comes."""
        if self.shown:
            with suppress(OSError, ValueError, AttributeError):  # there may be no terminal
                os.write(sys.stderr.fileno(), f"\n{text}\n".encode())
