"""Experiment trackers by name, through accelerate: TensorBoard, wandb, trackio, mlflow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..arguments import one_of, plain, shown
from ..images import read_image
from ..watching.run_file import leaves
from .parallel import Parallel

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
PROJECT = "muse"


def check_trackers(names: Any) -> list[str]:
    """Names of trackers that can be used here.

    Raises:
        ValueError: an unknown one, or one that is not installed.
    """
    given = plain([] if names is None else names)
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list):
        raise ValueError(f"trackers must be names, such as tensorboard, not {shown(names)}")
    for name in given:
        one_of("trackers", name, TrackerName)
        if find_spec(name) is None:
            raise ValueError(f"trackers: {name} is not installed: pip install {name}")
    return list(dict.fromkeys(given))


class Trackers:
    """Passes a stage's figures and pictures on. For the main process alone.

    One that fails is named in a warning and gets nothing more: the run goes on, and all figures
    stand in ``metrics.jsonl`` too. A resumed run goes on in the same run of TensorBoard, wandb and
    trackio; mlflow begins another.

    Args:
        names: of `check_trackers`.
        parallel: starts them.
        folder: the run's results folder.
        stage: name of the stage.
        warn: says what has failed.
    """

    def __init__(
        self, names: list[str], parallel: Parallel, folder: Path, stage: str,
        warn: Callable[[str], None],
    ):  # fmt: skip
        self.names, self.parallel, self.folder, self.stage = names, parallel, folder, stage
        self._warn = warn
        self._open: dict[str, Any] = {}

    def start(self, config: Mapping[str, Any]) -> None:
        """Open them; ``config``, of any nesting, says how the run is made."""
        name = f"{self.folder.resolve().name}-{self.stage}"
        number = hashlib.sha256(f"{self.folder.resolve()}/{self.stage}".encode()).hexdigest()
        settings: dict[str, dict[str, Any]] = {
            "tensorboard": {},
            "wandb": dict(name=name, id=number[:16], resume="allow", dir=str(self.folder)),
            "trackio": dict(name=name, resume="allow"),
            "mlflow": dict(run_name=name),
        }
        values = {key: str(value)[:250] for key, value in leaves(dict(config)).items()}
        for tracker in self.names:
            run = self.stage if tracker == "tensorboard" else PROJECT
            with self._tried(tracker):
                self._open[tracker] = self.parallel.tracker(
                    tracker, str(self.folder / tracker), run, values, settings[tracker]
                )

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Figures of a step; None: not finite."""
        finite = {name: value for name, value in values.items() if value is not None}
        for name in list(self._open):
            with self._tried(name):
                self._open[name].log(finite, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """A picture, by those that take any."""
        if not self._open or not path.is_file():
            return
        image = read_image(path)
        for tracker in list(self._open):
            with self._tried(tracker):
                if tracker == "tensorboard":
                    pixels = np.asarray(image)[None]
                    self._open[tracker].log_images({name: pixels}, step, dataformats="NHWC")
                elif tracker == "wandb":
                    self._open[tracker].log_images({name: [image]}, step)
                elif tracker == "mlflow":
                    self._open[tracker].log_artifact(str(path), "samples")

    def close(self) -> None:
        """Let all of them write what they still hold."""
        for name in list(self._open):
            with self._tried(name):
                self._open[name].finish()
        self._open = {}

    @contextmanager
    def _tried(self, name: str) -> Iterator[None]:
        """Around calls of a tracker."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            self._warn(
                f"the tracker {name} has failed and is left out from here on "
                f"({type(error).__name__}: {error}): the figures stand in metrics.jsonl; resume to "
                "try it again"
            )
