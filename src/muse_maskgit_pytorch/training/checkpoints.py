"""The checkpoints of a run: their names, how many are kept, and what killed processes left."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..checkpoint import load_tree, save_tree
from ..watching.log import writing


class Checkpoints:
    """Checkpoints ``NAME-checkpoint-########.safetensors`` in a folder, numbered by step.

    Args:
        folder: the run's results folder.
        name: of the stage.
        kind: what the files say that they are.
        keep: how many of the checkpoints that this run wrote to keep.
    """

    def __init__(self, folder: Path, name: str, kind: str, keep: int):
        self.folder, self.name, self.kind, self.keep = folder, name, kind, keep
        self._written: list[str] = []  # names of this run's checkpoints, oldest first

    def newest(self) -> Path | None:
        """The checkpoint of the latest step."""
        found = self.folder.glob(f"{self.name}-checkpoint-*.safetensors")
        ours = [path for path in found if self._is_ours(path.name)]
        return max(ours, default=None, key=lambda path: (len(path.name), path.name))

    def save(self, tree: dict[str, Any], step: int) -> None:
        """Write a checkpoint, then remove those of this run that are too many."""
        path = self.folder / f"{self.name}-checkpoint-{step:08d}.safetensors"
        with writing(path):
            save_tree(path, tree | {"written": self._written}, kind=self.kind)
        if path.name not in self._written:
            self._written.append(path.name)
        while len(self._written) > self.keep:
            (self.folder / self._written.pop(0)).unlink(missing_ok=True)

    def load(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint; call `resumed` once the run goes on from it."""
        return load_tree(path, kind=self.kind)[0]

    def resumed(self, path: Path, tree: dict[str, Any]) -> None:
        """The run goes on from this checkpoint: what it wrote before is its own again."""
        # the names come out of a file that may be anybody's, and are removed one day
        written = [n for n in tree["written"] if self._is_ours(n) and n != path.name]
        self._written = [*written, path.name]

    def _is_ours(self, name: Any) -> bool:
        """Whether a file name is that of a checkpoint of this stage, without any folder."""
        pattern = rf"{re.escape(self.name)}-checkpoint-[0-9]{{8,}}\.safetensors"
        return isinstance(name, str) and re.fullmatch(pattern, name) is not None

    def sweep(self) -> None:
        """Remove what earlier processes of this run left half-written when they were killed."""
        for path in self.folder.glob(f".{self.name}*.safetensors.*.tmp"):
            try:
                pid = int(path.name.split(".")[-2])
                if pid != os.getpid():  # in a container every process may have the same number
                    os.kill(pid, 0)
                    continue  # its process is alive
            except ProcessLookupError:
                pass
            except (PermissionError, ValueError, OverflowError):
                continue  # the process is another user's, or the file is not ours
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
