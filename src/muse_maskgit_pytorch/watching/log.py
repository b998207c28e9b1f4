"""The log of a training run: ``metrics.jsonl``, with the warnings that its figures give rise to."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..checkpoint import CheckpointError
from ..files import replacing
from .health import Health
from .report import read_warnings, write_report


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Wraps code that writes a file: if that fails, the error says which file and what to do.

    Raises:
        CheckpointError: the disk is full, or the folder is write-protected or gone.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room" if full else "see to it that the folder is there and can be written"
        raise CheckpointError(
            f"{path} could not be written ({error}): {remedy} and resume; checkpoints written "
            "before are intact"
        ) from error


def drop_lines_after(folder: Path, stage: str, step: int) -> None:
    """Take a stage's lines of later steps out of the log: the run goes on from this step.

    So no step stands there twice. Lines that are not whole are left as they are.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if not _is_after(line, stage, step)]
    if len(kept) < len(lines):
        with writing(path), replacing(path) as temporary:
            temporary.write_bytes(b"".join(kept))


def _is_after(line: bytes, stage: str, step: int) -> bool:
    try:
        read = json.loads(line)
        return read["stage"] == stage and read["step"] > step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


class Log:
    """Appends a stage's figures and warnings to ``metrics.jsonl``. For the main process alone.

    Args:
        folder: the run's results folder.
        stage: name of the stage in every line.
        health: judges the figures.
        say: prints a line on the terminal.
        follow: is given each step and its figures too.
    """

    def __init__(
        self, folder: Path, stage: str, health: Health, say: Callable[[str], None],
        follow: Callable[[int, dict[str, float | None]], None] = lambda step, line: None,
    ):  # fmt: skip
        self.path, self.follow = folder / "metrics.jsonl", follow
        self.stage, self.health, self.say = stage, health, say

    def begin(self, lines: Iterable[str], warnings: Iterable[str], step: int) -> None:
        """Say what the run is about to do, and warn, once in the log, of what defeats it."""
        for line in lines:
            self.say(line)
        known = read_warnings(self.path.parent, self.stage)
        for warning in warnings:
            if warning in known:
                self.say(f"as before: {warning}")
            else:
                self.warn(step, warning)

    def add(self, step: int, values: dict[str, float], codes_full: bool = False) -> None:
        """Append a line of figures, and the warnings that it calls for."""
        # JSON has no infinity and no NaN
        line: dict[str, float | None] = {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        self._write(step, line)
        self.follow(step, line)
        for warning in self.health.see({"step": step, **line}, codes_full):
            self.warn(step, warning)

    def warn(self, step: int, warning: str) -> None:
        """Print a warning and append it to the log, where the report finds it."""
        self.say(f"step {step}: {warning}")
        self._write(step, {"warning": warning})

    def report(self) -> None:
        """Draw the run as a page, if there is anything to draw."""
        if self.path.is_file():
            with writing(self.path.with_name("report.html")):
                page = write_report(self.path.parent)
            self.say(f"report: {page}")

    def _write(self, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"stage": self.stage, "step": step} | values) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.path), open(self.path, "ab+") as file:
            if file.tell():  # a killed process may have left half a line
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())
