"""What a training run shows on the terminal. It never ends the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from tqdm.auto import tqdm


@contextmanager
def _harmless(stream: TextIO | None) -> Iterator[None]:
    """A stream that fails (a closed pipe or terminal) goes to the null device from then on."""
    try:
        yield
    except (OSError, ValueError):  # ValueError: the stream is closed
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())  # type: ignore[union-attr]
            os.close(null)


class Progress:
    """A progress bar on standard error and lines on standard output; either may be missing.

    Args:
        name: shown before the bar.
        total: steps in all.
        shown: False hides everything.
    """

    def __init__(self, name: str, total: int, shown: bool = True):
        self.name, self.total, self.shown = name, total, shown
        self.bar: tqdm | None = None

    def start(self, step: int) -> None:
        """Show the bar, with so many steps done."""
        if self.shown and sys.stderr is not None:
            with _harmless(sys.stderr):
                self.bar = tqdm(
                    total=self.total, initial=step, desc=self.name, unit="step", dynamic_ncols=True
                )

    def step_to(self, step: int) -> None:
        if self.bar is not None:
            with _harmless(sys.stderr):
                self.bar.update(step - self.bar.n)

    def figures(self, values: dict[str, Any]) -> None:
        if self.bar is not None:
            with _harmless(sys.stderr):
                self.bar.set_postfix(values)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.shown and sys.stdout is not None:
            with _harmless(sys.stderr), _harmless(sys.stdout), tqdm.external_write_mode():
                print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            with _harmless(sys.stderr):
                self.bar.close()
