"""The checkpoints of a run: their names, how many are kept, and what killed processes left.

And the snapshots of its averages, all of which stay.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..arguments import fitting, real, whole
from ..checkpoint import load_tree, save_tree, state_of
from ..watching.log import writing
from ..weights import CheckpointError, reading, safetensors_file
from .shards import divided, joined, read, write

if TYPE_CHECKING:
    from .parallel import Parallel

# What every checkpoint of a run holds, whatever its release.
FIELDS = {
    "step": int,
    "modules": dict,
    "optimizers": dict,
    "ema": dict,
    "scaler": dict,
    "guard": dict,
    "config": dict,
    "frozen": str,
    "written": list,
}


KEPT = (0.05, 0.1)  # relative lengths of the averages that a training keeps, as in the paper
KIND = "training snapshot"
TREE, SHARDS = "tree.safetensors", "shards"  # in the folder of a sharded checkpoint


class Checkpoints:
    """Checkpoints ``NAME-checkpoint-########.safetensors`` in a folder, numbered by step.

    Where weights are divided among processes, a checkpoint is a folder without the ending: what is
    not divided in one file, and the parts of each process in another, written while training goes
    on. It takes its name once all of them are written. Both kinds go on on any number of processes.

    Args:
        folder: the run's results folder.
        name: of the stage.
        kind: what the files say that they are.
        keep: how many of the checkpoints that this run wrote to keep.
    """

    def __init__(self, folder: Path, name: str, kind: str, keep: int):
        self.folder, self.name, self.kind, self.keep = folder, name, kind, keep
        self._written: list[str] = []  # names of this run's checkpoints, oldest first
        self._pending: tuple[Path, Future] | None = None  # what is being written
        self._background = ThreadPoolExecutor(1)

    def newest(self) -> Path | None:
        """The checkpoint of the latest step."""
        found = self._found()
        return found[max(found)] if found else None

    def strangers(self) -> list[str]:
        """Names of files that look like checkpoints of this stage, but that the run did not name.

        A copy under another name, say, or a checkpoint of another step than its name says.
        """
        ours = set(self._found().values())
        found = self.folder.glob(f"{self.name}-checkpoint-*")
        return sorted(path.name for path in found if path not in ours)

    def _found(self) -> dict[int, Path]:
        """Checkpoints by step; what is too damaged to say its step has that of its name."""
        named = {}
        for path in self.folder.glob(f"{self.name}-checkpoint-*"):
            if self._is_ours(path.name):
                step = int(path.stem.rpartition("-")[2])
                if _step_of(path) in (step, None):
                    named[step] = path
        return named

    def save(self, tree: dict[str, Any], step: int) -> None:
        """Write a checkpoint, then remove those of this run that are too many.

        By the main process alone.
        """
        path = self.folder / f"{self.name}-checkpoint-{step:08d}.safetensors"
        with writing(path):
            save_tree(path, tree | {"written": self._written}, kind=self.kind)
            self._add(path.name)

    def save_sharded(self, tree: dict[str, Any], step: int, parallel: Parallel) -> None:
        """Begin to write a checkpoint in which tensors are divided; it is there after `finish`.

        By every process.
        """
        self.finish()
        rest, tensors = divided(tree)
        path = self.folder / f"{self.name}-checkpoint-{step:08d}"
        pid = int(parallel.broadcast(os.getpid()))  # the main process's: `sweep` asks for it
        temporary = path.with_name(f".{path.name}.{pid}.tmp")
        with writing(path):
            if parallel.is_main:
                rest["shards"] = {name: list(value.shape) for name, value in tensors.items()}
                save_tree(temporary / TREE, rest | {"written": self._written}, kind=self.kind)
            written = write(temporary / SHARDS, tensors, parallel.cpu_group)
        work = partial(self._complete, written, temporary, path, parallel.is_main)
        self._pending = path, self._background.submit(work)

    def _complete(self, written: Future, temporary: Path, path: Path, is_main: bool) -> None:
        written.result()  # on the main process: once all have written
        if is_main:
            for part in (temporary / SHARDS).iterdir():
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
            if path.exists():  # from before a return to an earlier step
                self._remove(path)
            os.replace(temporary, path)
            self._add(path.name)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is there.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._pending is not None:
            path, done = self._pending
            self._pending = None
            with writing(path):
                done.result()

    def _add(self, name: str) -> None:
        if name not in self._written:
            self._written.append(name)
        while len(self._written) > self.keep:
            self._remove(self.folder / self._written.pop(0))

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            # at once out of the way, and what a kill leaves of it is swept away
            away = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            os.replace(path, away)
            shutil.rmtree(away)
        else:
            path.unlink(missing_ok=True)

    def load(
        self, path: Path, like: Callable[[str], Tensor | None] = lambda name: None
    ) -> dict[str, Any]:
        """Read a checkpoint; call `resumed` once the run goes on from it.

        Args:
            path: file or folder.
            like: see `shards.read`.

        Raises:
            CheckpointError: it cannot be read; says which is the next one that can.
        """
        try:
            return self._read(path, like)
        except CheckpointError as error:
            found = self._found()
            for step in sorted(found, reverse=True):
                if found[step] != path and self._is_good(found[step]):
                    way = f"to go on from the next good one, {found[step].name}, move it elsewhere"
                    break
            else:
                way = "there is no other to go on from: choose another results_folder"
            raise CheckpointError(f"{error}; {way}") from error

    def _read(self, path: Path, like: Callable[[str], Tensor | None]) -> dict[str, Any]:
        tree, _ = load_tree(path / TREE if path.is_dir() else path, kind=self.kind)
        with reading(path):
            if path.is_dir():
                wanted = fitting("shards", tree.pop("shards", None), dict[str, list[int]])
                tree = joined(tree, read(path / SHARDS, wanted, like))
            for name, kind in FIELDS.items():
                fitting(name, tree.get(name), kind)
            for name in tree.keys() & {"step", "samples"}:  # older ones count no samples
                whole(name, tree[name], 0)
        return tree

    def _is_good(self, path: Path) -> bool:
        try:
            self._read(path, lambda name: None)
        except CheckpointError:
            return False
        return True

    def resumed(self, path: Path, tree: dict[str, Any]) -> None:
        """The run goes on from this checkpoint: what it wrote before is its own again."""
        # the names come out of a file that may be anybody's, and are removed one day
        written = [n for n in tree["written"] if self._is_ours(n) and n != path.name]
        self._written = [*written, path.name]

    def _is_ours(self, name: Any) -> bool:
        """Whether a run of this stage may have given a file this name, which has no folder."""
        pattern = rf"{re.escape(self.name)}-checkpoint-([0-9]{{8,18}})(\.safetensors)?"
        found = re.fullmatch(pattern, name) if isinstance(name, str) else None
        return found is not None and found[1] == f"{int(found[1]):08d}"

    def sweep(self) -> None:
        """Remove what earlier processes of this run left half-written when they were killed."""
        names = (f"{self.name}*", "metrics.*", "report.*")
        for path in [path for name in names for path in self.folder.glob(f".{name}.*.tmp")]:
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


class Snapshots:
    """Files ``NAME-snapshot-########.safetensors`` in a run's folder, numbered by step.

    Args:
        folder: the run's results folder.
        name: of the stage.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def found(self) -> dict[int, Path]:
        """Those of this stage by step, the earliest first."""
        pattern = re.compile(rf"{re.escape(self.name)}-snapshot-(\d{{8,18}})\.safetensors")
        names = {path: pattern.fullmatch(path.name) for path in self.folder.glob("*-snapshot-*")}
        return dict(sorted((int(match[1]), path) for path, match in names.items() if match))

    def write(
        self, step: int, averages: Mapping[str, Mapping[str, Tensor]], averaged: Collection[str]
    ) -> None:
        """Write the snapshot of a step.

        Args:
            step: done.
            averages: weights by name, by length.
            averaged: names of those that are averages; the others are the same in all.
        """
        path = self.folder / f"{self.name}-snapshot-{step:08d}.safetensors"
        copied = next(iter(averages.values()))
        tree = {
            "step": step,
            "averages": {
                length: {name: value for name, value in state.items() if name in averaged}
                for length, state in averages.items()
            },
            "copied": {name: value for name, value in copied.items() if name not in averaged},
        }
        with writing(path):
            save_tree(path, tree, kind=KIND)

    def drop_after(self, step: int) -> None:
        """Remove those of later steps: the run goes on from this one."""
        for later, path in self.found().items():
            if later > step:
                path.unlink()

    def read(self, path: Path) -> tuple[dict[float, dict[str, Tensor]], dict[str, Tensor]]:
        """Averages by length, and what is not averaged."""
        tree, _ = load_tree(path, kind=KIND)
        with reading(path):
            states = {
                real("length", float(length)): state_of(state, path)
                for length, state in tree["averages"].items()
            }
            if self.found().get(tree["step"]) != path:
                raise CheckpointError(
                    f"{path} is of step {tree['step']}: give it its own name back"
                )
            return states, state_of(tree.get("copied"), path)


def _step_of(path: Path) -> int | None:
    """The step that a checkpoint's header states; None if it cannot be read."""
    try:
        named = path / TREE if path.is_dir() else path
        with reading(named), safetensors_file(named) as file:
            pairs = json.loads(file.metadata()["tree"])["dict"]
            step = next(node["value"] for key, node in pairs if key == "step")
    except CheckpointError:
        return None
    return step if isinstance(step, int) else None
